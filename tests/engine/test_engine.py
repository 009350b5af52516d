"""The engine's own promises, on an oracle: bookkeeping, errors, what drafters are shown, memory given back."""

from __future__ import annotations

import pytest
import torch

from hasten import SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine, Limits
from hasten.engine.preparation import DRAFTERS
from hasten.model import CanvasOracle, DiffusionConfig, OracleModel
from helpers import Scripted

SIZE = 8


def next_token(last: int) -> int:
    return (3 * last + 1) % SIZE


def law(history: tuple[int, ...]) -> torch.Tensor:
    """Nearly certain of the successor of the last token."""
    return torch.full((SIZE,), 0.0).index_fill(0, torch.tensor([next_token(history[-1])]), 9.0)


def chain_from(last: int, count: int) -> list[int]:
    tokens = []
    for _ in range(count):
        last = next_token(last)
        tokens.append(last)
    return tokens


def engine(**limits: int) -> Engine:
    return Engine(OracleModel(law, SIZE, max_positions=64), limits=Limits(**limits))


def finish(made: Engine) -> None:
    for _ in made.run():
        pass


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "64 tokens, which leaves no room in the context of 64"),
        ([1, 8], {}, "token id 8 is outside the vocabulary of 8"),
        ([-1], {}, "token id -1 is outside the vocabulary of 8"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
        ([1], {"logit_bias": {8: 1.0}}, "token id 8 is outside the vocabulary of 8"),
    ],
)
def test_refused(prompt, settings, message):
    made = engine()
    with pytest.raises(UserError, match=message):
        made.add(prompt, SamplingParams(**settings))
    with pytest.raises(UserError, match="unknown method"):
        made.add([1], SamplingParams(), "no-such-method")
    assert not made.busy


def test_one_step_at_a_time():
    made = engine()
    (request,) = made.add([5], SamplingParams(max_tokens=3))
    assert made.busy
    assert not request.started
    (progress,) = made.step()
    assert (progress.request, progress.tokens, progress.kinds) == (request, chain_from(5, 1), ["plain"])
    assert (progress.text, progress.finish_reason) == ("", None)
    finish(made)
    assert request.output == chain_from(5, 3)
    assert request.finish_reason == "length"
    assert request.seconds > 0
    assert request.arrived <= request.first_token_at <= request.finished_at
    assert made.step() == []


def test_drafters_are_shared_per_specification():
    made = engine()
    assert made.drafter("ngram")[1] is made.drafter("ngram")[1]
    assert made.drafter("ngram:length=3")[1] is not made.drafter("ngram")[1]
    own = Scripted(lambda request: Draft())
    assert made.drafter(own) == ("Scripted", own)


def test_what_a_drafter_is_shown():
    """The prompt in chunks, then each verified draft with all its rows, rejected ones included."""

    def script(request):
        right = chain_from(request.tokens[-1], 2)
        return Draft([right[0], (right[0] + 1) % SIZE, right[1], right[1]], [ROOT, ROOT, 0, 1])

    made = engine(rows=4)
    drafter = Scripted(script)
    prompt = [5] * 10
    (request,) = made.add(prompt, SamplingParams(max_tokens=7), drafter)
    assert drafter.began == [request.id]
    finish(made)
    assert drafter.ended == [request.id]
    assert drafter.read == {request.id: [0, 4, 8]}
    first, second, *rest = drafter.seen[request.id]
    assert (first.draft, first.path, first.tokens) == (Draft(), [], chain_from(5, 1))
    assert second.path == [0, 2]
    assert second.tokens == chain_from(first.tokens[-1], 3)
    assert second.logits.shape == (5, SIZE)
    for row, node in enumerate([ROOT, 0, 1, 2, 3]):
        last = first.tokens[-1] if node == ROOT else second.draft.tokens[node]
        assert torch.equal(second.logits[row], law((last,)))
    # The step that ends a request is not observed.
    assert rest == []
    assert request.kinds == ["plain", *["accepted"] * 2, "correction", *["accepted"] * 2, "correction"]
    assert request.statistics.prompt_rows == 10
    assert request.statistics.rows == 1 + 5 + 5
    assert request.statistics.proposed == 8
    assert request.statistics.accepted_per_step == [0, 2, 2]


def test_each_choice_sees_the_prompt():
    made = engine(rows=4, sequences=2)
    drafter = Scripted(lambda request: Draft())
    requests = made.add([5] * 10, SamplingParams(max_tokens=4, n=4), drafter)
    finish(made)
    assert drafter.read == {request.id: [0, 4, 8] for request in requests}
    assert [request.statistics.prompt_rows for request in requests] == [10, 0, 0, 0]
    assert {tuple(request.output) for request in requests} == {tuple(chain_from(5, 4))}


@pytest.mark.parametrize("when", ["begin", "propose", "observe"])
def test_a_drafter_that_raises(when):
    """The error reaches the caller, who ends what is left; nothing keeps memory or a place."""
    made = engine()
    drafter = Scripted(lambda request: Draft.chain([1]))

    def fail(*arguments):
        raise RuntimeError("a bug in a drafter")

    setattr(drafter, when, fail)
    requests = made.add([2, 3], SamplingParams(max_tokens=30))
    with pytest.raises(RuntimeError, match="a bug in a drafter"):
        requests += made.add([1], SamplingParams(max_tokens=9, n=3), drafter)
        finish(made)
    if when == "begin":
        assert [*made.scheduler.waiting, *made.scheduler.running] == requests
    for request in requests:
        made.abort(request)
    assert not made.busy
    assert made.cache.used_bytes == 0


def test_abort():
    made = engine(sequences=2)
    drafter = Scripted(lambda request: Draft.chain([1]))
    running, other = (made.add([start], SamplingParams(max_tokens=9), drafter)[0] for start in (1, 2))
    waiting = made.add([3], SamplingParams(max_tokens=9), drafter)[0]
    made.step()
    for request in (running, waiting, running):
        made.abort(request)
        assert request.finish_reason == "abort"
    finish(made)
    made.abort(other)
    assert other.finish_reason == "length"
    assert other.output == chain_from(2, 9)
    assert waiting.output == []
    assert sorted(drafter.ended) == [running.id, other.id, waiting.id]
    assert made.cache.used_bytes == 0


@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_drafts_are_cut_to_what_may_come(most):
    """The target adds a token of its own, so the last that may come is never drafted."""
    made = engine()
    drafter = Scripted(lambda request: Draft.chain([next_token(request.tokens[-1]) ^ 1] * 9))
    (request,) = made.add([5], SamplingParams(max_tokens=most), drafter)
    finish(made)
    assert request.statistics.proposed == sum(range(most - 1))
    assert request.output == chain_from(5, most)


def test_logprobs():
    """The model's own, whatever is done to the distribution; no more of them than tokens."""
    made = engine()
    asked = SamplingParams(max_tokens=6, logprobs=50, temperature=5.0, top_k=3, repetition_penalty=2.0, seed=1)
    (request,) = made.add([5], asked, Scripted(lambda request: Draft.chain(chain_from(request.tokens[-1], 2))))
    finish(made)
    assert len(request.logprobs) == len(request.output) == 6
    for position, entry in enumerate(request.logprobs):
        table = law((request.tokens[position],)).log_softmax(-1)
        assert entry.token == request.output[position]
        assert entry.logprob == pytest.approx(float(table[entry.token]), abs=1e-6)
        assert len(entry.top) == SIZE
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        for token, value in entry.top:
            assert value == pytest.approx(float(table[token]), abs=1e-6)


def test_no_seed_means_another_text_each_time():
    made = Engine(OracleModel(lambda history: torch.zeros(SIZE), SIZE))
    outputs = set()
    for _ in range(4):
        (request,) = made.add([1], SamplingParams(max_tokens=20, temperature=1))
        finish(made)
        outputs.add(tuple(request.output))
    assert len(outputs) == 4


def test_cache_limit_is_told():
    made = Engine(OracleModel(law, SIZE, max_positions=4096), cache_bytes=2000)
    (request,) = made.add([1] * 1000, SamplingParams(max_tokens=5))
    with pytest.raises(UserError, match="the KV cache is full"):
        finish(made)
    made.abort(request)
    assert made.cache.used_bytes == 0


UNUSABLE = {
    "nan": torch.full((SIZE,), torch.nan),
    "one nan": torch.tensor([0.0, 9.0, 0.0, torch.nan, 0.0, 0.0, 0.0, 0.0]),
    "infinite": torch.tensor([0.0, 9.0, 0.0, torch.inf, 0.0, 0.0, 0.0, 0.0]),
    "nothing is possible": torch.full((SIZE,), -torch.inf),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n": 2},
        {"logit_bias": {1: 0.5}},
        {"repetition_penalty": 1.01},
        {"temperature": 0.1, "seed": 1},
        {"temperature": 0.1, "seed": 1, "top_k": 3, "acceptance": "max"},
        {"temperature": 0.1, "seed": 1, "acceptance": "typical"},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_logits_that_are_not_finite_end_the_request_they_are_of(kind, length, settings):
    """Prompt 2 comes to token 6, behind which there are none; prompt 5 never does."""
    spoilt = OracleModel(lambda history: UNUSABLE[kind] if history[-1] == 6 else law(history), SIZE, max_positions=64)
    made = Engine(spoilt)
    drafter = Scripted(lambda request: Draft.chain(chain_from(request.tokens[-1], length)))
    (well,) = made.add([5], SamplingParams(max_tokens=12), drafter)
    sick = made.add([2], SamplingParams(max_tokens=12, **settings), drafter)
    while made.busy:
        made.step()
    for each in sick:
        if 6 in each.tokens or each.finish_reason == "error":
            assert "the model's logits are not finite" in str(each.error)
            assert 6 not in each.tokens[:-1]
    assert any(each.error is not None for each in sick)
    (other,) = made.add([4], SamplingParams(max_tokens=5))
    finish(made)
    assert well.output == chain_from(5, 12)
    assert other.output == chain_from(4, 5)
    assert made.cache.used_bytes == 0


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_rejected_draft_without_finite_logits_does_no_harm(settings):
    """Plain decoding never sees what follows a token that it does not choose."""
    spoilt = OracleModel(lambda history: UNUSABLE["nan"] if history[-1] == 6 else law(history), SIZE, max_positions=64)
    made = Engine(spoilt)
    asked = SamplingParams(max_tokens=12, **settings)
    outputs = []
    for method in ("plain", Scripted(lambda request: Draft([6, 6, 6], [ROOT, 0, 1]))):
        (request,) = made.add([5], asked, method)
        while made.busy:
            made.step()
        outputs.append((request.output, request.finish_reason))
    assert outputs[0] == outputs[1]


def test_tokens_that_are_impossible_are_no_fault():
    banned = OracleModel(lambda history: law(history).index_fill(0, torch.tensor([2, 3]), -torch.inf), SIZE)
    made = Engine(banned)
    (request,) = made.add([5], SamplingParams(max_tokens=4))
    (biased,) = made.add([5], SamplingParams(max_tokens=1, logit_bias={0: -float("inf")}))
    finish(made)
    assert request.output == chain_from(5, 4)
    assert biased.output != chain_from(5, 1)


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("method", ["denoise", "denoise:order=entropy", "threshold"])
def test_a_canvas_without_finite_logits(kind, method):
    def canvas_law(seen, position):
        return UNUSABLE[kind] if position == 5 and len(seen) > 6 else law((position,))

    made = Engine(CanvasOracle(canvas_law, SIZE, DiffusionConfig("full", "same", SIZE - 1)))
    (well,) = made.add([1], SamplingParams(max_tokens=4), method)
    (sick,) = made.add([1], SamplingParams(max_tokens=9), method)
    while made.busy:
        made.step()
    assert "the model's logits are not finite" in str(sick.error)
    assert sick.output == []
    assert (len(well.output), well.error) == (4, None)


def test_drafters_of_unused_specifications_are_let_go():
    made = engine()
    (request,) = made.add([5], SamplingParams(max_tokens=40), "ngram:length=1")
    first = made.drafter("ngram:length=1")[1]
    made.step()
    kept = [made.drafter(f"ngram:length={length}")[1] for length in range(2, 3 * DRAFTERS)]
    assert len(made._preparation._drafters) == DRAFTERS
    # What a request uses stays, and what was used last.
    assert made.drafter("ngram:length=1")[1] is first is request.drafter
    assert made.drafter(f"ngram:length={3 * DRAFTERS - 1}")[1] is kept[-1]
    assert made.drafter("ngram:length=2")[1] is not kept[0]
    finish(made)
