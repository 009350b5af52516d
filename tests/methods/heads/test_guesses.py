"""Children of a draft's nodes by a head's logits: the likeliest, and those that a sampling target is about to draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.engine import ROOT, Draft, Request
from hasten.methods.heads import guesses
from hasten.methods.heads.guesses import CANDIDATES, Guesses, Place
from helpers import VOCABULARY

PROMPT = [5, 9, 13]


@pytest.fixture
def asked(llm: LLM) -> Callable[..., Request]:
    """Requests of an engine."""

    def add(**params: object) -> Request:
        made = SamplingParams(**{"max_tokens": 8, "seed": 4, **params})  # type: ignore[arg-type]
        [request] = llm.engine.add(PROMPT, made, "plain")
        llm.engine.abort(request)
        return request

    return add


def logits_of(rows: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1))


def places(request: Request, count: int) -> list[Place]:
    return [Place(request, node, node + 1) for node in range(ROOT, count - 1)]


def sure(own: Guesses, request: Request, odds: float) -> None:
    own._beliefs.of(request).odds = odds


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "acceptance": "typical"}])
def test_without_noise_children_are_the_likeliest(asked: Callable[..., Request], params: dict[str, object]) -> None:
    request, logits, own = asked(**params), logits_of(3), Guesses(None)
    own.begin([request])
    expected = logits.softmax(-1).sort(-1, descending=True)
    for row, children in enumerate(own.behind(places(request, 3), logits, 5)):
        assert [token for token, _ in children] == expected.indices[row, :5].tolist()
        assert [worth for _, worth in children] == pytest.approx(expected.values[row, :5].tolist())


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_where_the_target_draws_as_the_head_does_its_draw_is_the_first(
    asked: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """At all depths."""
    monkeypatch.setattr(guesses, "CANDIDATES", VOCABULARY)
    logits, right = logits_of(4), 0
    for seed in range(50):
        request, own = asked(temperature=temperature, seed=seed), Guesses(None)
        sure(own, request, -40.0)
        own.begin([request])
        at = [len(PROMPT) + depth for depth in range(4)]
        drawn = request.sampler.choose(logits, at, [[]] * 4)
        for children, token in zip(own.behind(places(request, 4), logits, 3), drawn, strict=True):
            right += children[0][0] == token
    assert right == 200


def test_where_it_is_sure_noise_counts_for_nothing(asked: Callable[..., Request]) -> None:
    request, logits, own = asked(temperature=1.0), logits_of(1, 6.0), Guesses(None)
    sure(own, request, 40.0)
    own.begin([request])
    [children] = own.behind([Place(request, ROOT, 0)], logits, 5)
    assert [token for token, _ in children] == logits[0].topk(5).indices.tolist()


def test_of_few_words_by_their_tokens(asked: Callable[..., Request]) -> None:
    """What noise a word has is its token's."""
    words = torch.arange(3, VOCABULARY, 2)
    request, logits = asked(temperature=1.0), logits_of(2)
    whole = torch.full_like(logits, -torch.inf)
    whole[:, words] = logits[:, : len(words)]
    found = []
    for own, given in ((Guesses(words), logits[:, : len(words)]), (Guesses(None), whole)):
        own.begin([request])
        found.append(own.behind(places(request, 2), given, 6))
    for few, all_ in zip(*found, strict=True):
        assert [token for token, _ in few] == [token for token, _ in all_]
        assert [worth for _, worth in few] == pytest.approx([worth for _, worth in all_])


def test_requests_beside_each_other_are_as_alone(asked: Callable[..., Request]) -> None:
    requests = [asked(), asked(temperature=1.0), asked(temperature=0.5, seed=8)]
    logits, spots = logits_of(6), [place for request in requests for place in places(request, 2)]
    own = Guesses(None)
    own.begin(requests)
    together = own.behind(spots, logits, 4)
    for number, request in enumerate(requests):
        alone = Guesses(None)
        alone.begin([request])
        rows = slice(2 * number, 2 * number + 2)
        assert alone.behind(spots[rows], logits[rows], 4) == together[rows]
    assert CANDIDATES < VOCABULARY


def test_of_levels_the_belief_learns_as_of_nodes(asked: Callable[..., Request], llm: LLM) -> None:
    """A draft whose nodes have the children of their level is judged down the path that came."""
    request, logits = asked(temperature=1.0), logits_of(2)
    odds = []
    for levels in (True, False):
        own = Guesses(None)
        own.begin([request])
        if levels:
            [found] = own.levels([request], [2], logits, 2)
        else:
            found = own.behind([Place(request, ROOT, 0), Place(request, 0, 1)], logits, 2)
        first, second = ([token for token, _ in level] for level in found)
        draft = Draft([*first, *second], [ROOT, ROOT, 0, 0])
        (own.made_of_levels if levels else own.made)(request, draft)
        own._open[request.id].judge(draft, [first[0], second[1]])
        odds.append(own._beliefs.of(request).odds)
    assert odds[0] == odds[1] != Guesses(None)._beliefs.of(request).odds


# The heads of Medusa that are made here are hardly ever right.
SAVED = {
    "medusa:sized=false,nodes=4": 0.01,
    "hydra:sized=false,nodes=4,least=0": 0.05,
    "hydra:head={tiny}/heads/hydra-prefix,sized=false,nodes=4,least=0": 0.05,
    "eagle:sized=false,nodes=4,least=0": 0.05,
    "chimera:sized=false,nodes=4,least=0": 0.05,
}


@pytest.mark.parametrize(("spec", "saved"), SAVED.items())
def test_noise_saves_steps(llm: LLM, tiny: Path, monkeypatch: pytest.MonkeyPatch, spec: str, saved: float) -> None:
    """Of heads that say nearly what their target says, and the text stays the same."""
    prompts = [[3 + number, 40, 7, 90 - number] for number in range(12)]
    params = SamplingParams(max_tokens=32, temperature=1.0, seed=2, ignore_eos=True)

    def decoded() -> tuple[list[list[int]], int]:
        done = [each.choices[0] for each in llm.generate(prompts, params, spec.format(tiny=tiny))]
        return [each.token_ids for each in done], sum(each.statistics.steps for each in done)

    tokens, steps = decoded()
    monkeypatch.setattr(Guesses, "begin", lambda self, requests: None)
    without, more = decoded()
    assert tokens == without and steps <= (1 - saved) * more
