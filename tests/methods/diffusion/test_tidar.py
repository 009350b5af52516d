"""TiDAR: the text of plain decoding, whatever its masks say, and as few steps as they are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from canvases import BLOCK, MASK, PROMPTS, VOCABULARY, Watched, decode, oracle, run

from hasten.cache import Cache
from hasten.engine import Draft, Engine, Probe, Request, SamplingParams
from hasten.errors import UserError
from hasten.model import DiffusionConfig, Rows
from helpers import Scripted

Models = Callable[..., Any]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "max": {"temperature": 1.0, "seed": 1, "acceptance": "max"},
    "penalties": {"temperature": 0.8, "top_k": 6, "seed": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
}
NAME = "context-causal-same"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_law_is_decoded_as_plainly(kind: str, block: int) -> None:
    jobs = [(prompt, SamplingParams(max_tokens=5 + 3 * number, **KINDS[kind])) for number, prompt in enumerate(PROMPTS)]
    plain = run(Engine(oracle(NAME)), *[(*job, "plain") for job in jobs])
    drafted = run(Engine(oracle(NAME)), *[(*job, f"tidar:block={block}") for job in jobs])
    for job, one, other in zip(jobs, drafted, plain, strict=True):
        assert one.output == other.output
        (alone,) = run(Engine(oracle(NAME)), (*job, f"tidar:block={block}"))
        assert (alone.output, alone.statistics.steps) == (one.output, one.statistics.steps)


@pytest.mark.parametrize("block", [2, 4, 8])
def test_an_untrained_network_is_decoded_as_plainly(block: int, models: Models) -> None:
    model = models(NAME, 8).model
    for kind in ("greedy", "penalties"):
        jobs = [(prompt, SamplingParams(max_tokens=14, **KINDS[kind])) for prompt in PROMPTS]
        plain = run(Engine(model), *[(*job, "plain") for job in jobs])
        # Neighbours that fill canvases, and one that decodes plainly, change nothing.
        others = [(PROMPTS[0], SamplingParams(max_tokens=9), spec) for spec in ("denoise", "plain")]
        drafted = run(Engine(model), *[(*job, f"tidar:block={block}") for job in jobs], *others)
        assert [request.output for request in drafted[:-2]] == [request.output for request in plain]


def test_the_cache_after_each_step_is_that_of_a_fresh_prefill(models: Models) -> None:
    model = models(NAME, 8).model
    engine = Engine(model)
    (request,) = engine.add(PROMPTS[3], SamplingParams(max_tokens=12), "tidar:block=4")
    for progress in engine.run():
        if progress.finish_reason is not None:
            break
        fresh = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
        tokens = request.tokens[:-1]
        model.forward(Rows.of(fresh, tokens, 0))
        ((ours, length),), ((theirs, _),) = request.sequence.memory(0), fresh.memory(0)
        assert length == len(tokens)
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(one[:, :, :length], other[:, :, :length], atol=1e-9, rtol=0)


def test_masks_are_seen_by_nothing(models: Models) -> None:
    """Whatever their embedding is, the logits of all other rows stay the same to the bit."""
    model = models(NAME, 8).model
    embedding = model.embedding.clone()
    embedding[90] = 1000.0
    draft = Draft.chain([4, 8, 15])
    draft.probes = [Probe(node, [90] * 4) for node in range(-1, 3)]
    rows = []
    for each in (model, dataclasses.replace(model, embedding=embedding)):
        drafter = Scripted(lambda request: draft)
        run(Engine(each), (PROMPTS[3], SamplingParams(max_tokens=9), drafter))
        rows.append(drafter.seen[next(iter(drafter.seen))][1])
    one, other = rows
    assert torch.equal(one.logits, other.logits)
    assert one.probes.shape == other.probes.shape == (4 * 4, 97)
    assert not torch.equal(one.probes, other.probes)


# How many are accepted


def agreeing(wrong: Callable[[int], bool]) -> Watched:
    """A model whose rows say what stands at a position; its masks say so only in the group of the last finished token,
    and something else where `wrong`."""

    def law(seen: list[tuple[int, int]], position: int) -> torch.Tensor:
        masks = [place for place, token in seen if token == MASK]
        finished = [place for place, token in seen if token != MASK]
        if masks:
            right = max(finished) == min(masks) - 1 and len(masks) == masks[-1] - masks[0] + 1 and not wrong(position)
            token = position % 7 + (0 if right else 1)
        else:
            token = (position + 1) % 7
        return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY).float() * 9

    return Watched(law, VOCABULARY, DiffusionConfig("context-causal", "same", MASK, 8))


def accepted(model: Watched, block: int, tokens: int) -> Request:
    request = decode(model, f"tidar:block={block}", [1, 2, 3], max_tokens=tokens)
    assert request.output == [position % 7 for position in range(3, 3 + tokens)]
    return request


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_right_drafts_give_a_block_per_step(block: int) -> None:
    """After the prompt and a step without a draft; a step computes the block, and a group of masks per node."""
    model = agreeing(lambda position: False)
    request = accepted(model, block, 2 + 4 * block)
    assert request.statistics.accepted_per_step == [0, 0, *[block - 1] * 4]
    assert model.rows()[:4] == [3, 1 + block, block + block * block, block + block * block]


@pytest.mark.parametrize("block", [1, 2, 4])
def test_no_head_is_computed_for_masks_that_nobody_reads(block: int) -> None:
    """A group's first mask stands where verification's own token comes."""
    model = agreeing(lambda position: False)
    engine = Engine(model)
    (request,) = run(engine, ([1, 2, 3], SamplingParams(max_tokens=2 + 4 * block), f"tidar:block={block}"))
    assert engine.ledger.most.logits == 4 * VOCABULARY * (block + block * (block - 1))
    # They are rows of the step all the same.
    assert request.statistics.rows == 1 + sum(model.rows()[1:])


def test_wrong_drafts_are_cut_where_they_are_wrong() -> None:
    """Masks are wrong at every fifth position: counted by hand, the group is that of what was accepted."""
    request, block = accepted(agreeing(lambda position: position % 5 == 0), 4, 30), 4
    expected, position = [0, 0], 5
    while position < 33:
        # The root is one before `position`; its masks stand for what comes behind the token at `position`.
        run_length = 0
        while run_length < block - 1 and (position + run_length) % 5:
            run_length += 1
        # The last token of the budget is never drafted.
        expected.append(min(run_length, 32 - position))
        position += run_length + 1
    assert request.statistics.accepted_per_step == expected


def test_stopping_and_streaming() -> None:
    def model() -> Watched:
        return agreeing(lambda position: position % 3 == 0)

    engine = Engine(model(), end_ids=[2])
    (request,) = engine.add([1, 2, 3], SamplingParams(max_tokens=20), "tidar")
    came = [token for progress in engine.run() for token in progress.tokens]
    assert came == request.output == [3, 4, 5, 6, 0, 1, 2]
    assert request.finish_reason == "stop"
    assert engine.cache.used_bytes == 0
    for budget in range(1, 10):
        assert len(decode(model(), "tidar", [1, 2, 3], max_tokens=budget).output) == budget


@pytest.mark.parametrize("block", [1, 3, 8])
def test_the_context_is_filled_to_its_end_and_no_row_stands_behind_it(block: int) -> None:
    """Masks end where the context does; what stands before the end is drafted as well as elsewhere."""
    for prompt in range(1, 16):
        model = agreeing(lambda place: place % 5 == 0)
        model.config = dataclasses.replace(model.config, max_positions=16)
        text = [place % 7 for place in range(16)]
        request = decode(model, f"tidar:block={block}", text[:prompt])
        assert request.tokens == text
        places = [place for spans in model.passes for _, positions in spans for place in positions]
        assert max(places) < 16
        room = decode(
            agreeing(lambda position: position % 5 == 0), f"tidar:block={block}", text[:prompt], max_tokens=40
        )
        # The same drafts as in a longer context, until the last token, which is never drafted.
        known = request.statistics.accepted_per_step[:-1]
        assert known == room.statistics.accepted_per_step[: len(known)]


def test_refusals() -> None:
    for name in ("full-same", "block-causal-same", "context-causal-shifted"):
        with pytest.raises(UserError, match=r"^tidar needs a model that fills masks .*hasten train tidar"):
            Engine(oracle(name)).drafter("tidar")
    with pytest.raises(UserError, match=f"block must be at most {BLOCK}"):
        Engine(oracle(NAME)).drafter("tidar:block=5")
    with pytest.raises(UserError, match="block must be between 0"):
        Engine(oracle(NAME)).drafter("tidar:block=33")
