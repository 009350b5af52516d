"""One token per pass is what its definition says, however it is computed; and what all canvases have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from canvases import (
    BLOCK,
    BLOCKS,
    CONFIGS,
    FULL,
    MASK,
    PROMPTS,
    VOCABULARY,
    by_law,
    by_position,
    canvas_of,
    decode,
    everything_counts,
    oracle,
    reference,
    run,
)
from torch import Tensor

from hasten import LLM
from hasten.engine import Constraint, Engine, SamplingParams, View
from hasten.errors import UserError
from hasten.methods.diffusion.denoise import Denoise

Models = Callable[..., Any]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 8, "repetition_penalty": 1.3, "frequency_penalty": 0.4}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every view that `denoise` is given."""
    logits: list[Tensor] = []
    update = Denoise.update

    def spy(self: Denoise, request: Any, view: View) -> None:
        logits.append(view.logits)
        update(self, request, view)

    monkeypatch.setattr(Denoise, "update", spy)
    return logits


# What is decoded


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_network_decodes_as_transformers_would_from_scratch(
    name: str, prompt: list[int], models: Models, said: list[Tensor]
) -> None:
    """Without any cache there, with one here; seven tokens end inside of a block."""
    pair = models(name)
    request = decode(pair.model, "denoise:block=4", prompt, max_tokens=7)
    tokens, passes, expected = reference(pair.config, pair.logits, prompt, 7)
    assert request.output == tokens
    assert request.finish_reason == "length"
    assert len(said) <= len(expected)
    for ours, theirs in zip(said, expected, strict=False):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    if name in FULL:
        assert request.statistics.steps == passes == 7


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("per_step", [1, 2, 9])
def test_a_law_is_decoded_by_its_definition(name: str, per_step: int) -> None:
    for prompt in PROMPTS:
        request = decode(oracle(name), f"denoise:block=4,per_step={per_step}", prompt, max_tokens=9)
        assert request.output == reference(CONFIGS[name], by_law(name), prompt, 9, per_step=per_step)[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("params", [{}, {**SAMPLED, "seed": 3}], ids=["greedy", "sampled"])
def test_other_ways_to_commit_one_token_per_pass(name: str, params: dict[str, Any]) -> None:
    prompt = PROMPTS[3]
    expected = decode(oracle(name), "denoise:block=4", prompt, max_tokens=10, **params)
    specs = ["threshold:threshold=1.1,block=4", "factor:factor=0,block=4"]
    if name in FULL:
        specs += [f"denoise:block=4,refresh=1,cache={cache}" for cache in ("prefix", "dual")]
    if CONFIGS[name].attention != "context-causal":
        expected_plain = decode(oracle(name), "denoise", prompt, max_tokens=10, **params)
        assert decode(oracle(name), "plain", prompt, max_tokens=10, **params).output == expected_plain.output
    for spec in specs:
        request = decode(oracle(name), spec, prompt, max_tokens=10, **params)
        assert request.output == expected.output
        assert request.statistics.steps == expected.statistics.steps


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_stale_cache_computes_fewer_rows(name: str, cache: str) -> None:
    """8 prompt tokens, 8 new ones in blocks of 4: the first look of a block is whole."""
    model = oracle(name)
    decode(model, f"denoise:block=4,cache={cache}", PROMPTS[4], max_tokens=8)
    shift = name == "full-shifted"
    inner = [8 + shift, 4 + shift] if cache == "prefix" else [4 + shift, 4 + shift]
    assert model.rows() == [16, *[inner[0]] * 3, 16, *[inner[1]] * 3]


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_filled_one_after_the_other(name: str) -> None:
    request = decode(oracle(name), "denoise:block=4,part=2", PROMPTS[2], max_tokens=8)
    decided = canvas_of(request).committed_at[4:12].reshape(4, 2)
    assert (decided[:-1].max(1).values < decided[1:].min(1).values).all()


def test_orders() -> None:
    """Two tokens nearly tied lead at position 1, one at position 2; position 3 is the least sure."""

    def law(seen: Any, position: int) -> Tensor:
        chances = {1: [0.46, 0.44, 0.1], 2: [0.45, 0.19, 0.18, 0.18], 3: [0.3, 0.3, 0.2, 0.2]}[position]
        return torch.tensor(chances + [1e-9] * (VOCABULARY - len(chances))).log()

    def order(name: str) -> list[int]:
        request = decode(oracle("full-same", law), f"denoise:order={name}", [5], max_tokens=3, seed=1)
        return canvas_of(request).committed_at[1:].tolist()

    assert order("confidence") == order("entropy") == [1, 2, 3]
    assert order("margin") == [2, 1, 3]
    assert sorted(order("random")) == [1, 2, 3]
    orders = {
        tuple(
            canvas_of(decode(oracle("full-same", law), "denoise:order=random", [5], max_tokens=3, seed=seed))
            .committed_at[1:]
            .tolist()
        )
        for seed in range(40)
    }
    assert len(orders) == 6


# Neighbours


def ragged(name: str) -> list[tuple[list[int], SamplingParams, str]]:
    """Jobs of different lengths and methods; beside them plain decoding where the model knows it."""
    specs = [
        "denoise:block=4",
        "threshold:threshold=0.5,block=3",
        "freedave:block=4",
        "localleap",
        "denoise:per_step=3",
    ]
    if name in BLOCKS:
        specs += ["fast-dllm-v2:part=2,block_cache=true", "dparallel:entropy=1.0"]
    else:
        specs += ["denoise:cache=dual,block=4", "threshold:cache=prefix,block=2"]
    if CONFIGS[name].attention == "context-causal":
        specs += ["plain", "ngram"]
    return [
        (
            PROMPTS[number % 5],
            SamplingParams(max_tokens=3 + number, seed=number, **(SAMPLED if number % 2 else {})),
            spec,
        )
        for number, spec in enumerate(specs)
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_neighbours_change_nothing(name: str) -> None:
    together = run(Engine(oracle(name)), *ragged(name))
    for job, request in zip(ragged(name), together, strict=True):
        (alone,) = run(Engine(oracle(name)), job)
        assert request.output == alone.output
        assert request.statistics.steps == alone.statistics.steps
        assert request.statistics.rows == alone.statistics.rows
        assert len(request.output) == job[1].max_tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_neighbours_change_nothing_in_a_network(name: str, models: Models) -> None:
    model = models(name).model
    for job, request in zip(ragged(name), run(Engine(model), *ragged(name)), strict=True):
        assert request.output == run(Engine(model), job)[0].output


def test_choices_differ_and_the_first_is_that_of_a_single_one() -> None:
    engine = Engine(oracle("block-causal-shifted"))
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=2, n=3)
    choices = engine.add(PROMPTS[3], params, "denoise")
    for _ in engine.run():
        pass
    single = decode(oracle("block-causal-shifted"), "denoise", PROMPTS[3], max_tokens=9, temperature=1.5, seed=2)
    assert choices[0].output == single.output
    assert len({tuple(choice.output) for choice in choices}) == 3


# The mask token


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mask_token_in_a_prompt_is_text(name: str) -> None:
    prompt = [3, MASK, 4, 1, MASK]
    alone = decode(oracle(name), "denoise:block=4", prompt, max_tokens=6)
    assert alone.tokens[:5] == prompt
    assert alone.output == reference(CONFIGS[name], by_law(name), prompt, 6)[0]
    params = SamplingParams(max_tokens=6)
    jobs = [([5, 5], params, "denoise:block=4"), (prompt, params, "denoise:block=4")]
    assert run(Engine(oracle(name)), *jobs)[1].output == alone.output


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("params", [{}, {"temperature": 2.0, "seed": 0}, {"logit_bias": {MASK: 100.0}}], ids=str)
def test_the_mask_is_never_generated(name: str, params: dict[str, Any]) -> None:
    def law(seen: Any, position: int) -> Tensor:
        logits = everything_counts(seen, position)
        logits[MASK] = 50.0
        return logits

    specs = ["denoise", "threshold:threshold=0.1"]
    specs += ["plain"] if CONFIGS[name].attention == "context-causal" else []
    for spec in specs:
        output = decode(oracle(name, law), spec, [1, 2, 3], max_tokens=9, **params).output
        assert len(output) == 9
        assert MASK not in output


# Ends


@pytest.mark.parametrize("name", CONFIGS)
def test_the_budget_is_kept_exactly(name: str) -> None:
    for budget in range(1, 7):
        request = decode(oracle(name), "denoise:block=4,per_step=2", PROMPTS[3], max_tokens=budget)
        assert len(request.output) == request.statistics.tokens == budget
        assert request.finish_reason == "length"


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_budget_the_context_ends_the_text(name: str) -> None:
    model = oracle(name)
    model.config = type(model.config)(**{**vars(model.config), "max_positions": 15})
    request = decode(model, "denoise:block=4", PROMPTS[3])
    assert (len(request.tokens), request.finish_reason) == (15, "length")
    assert len(decode(oracle("full-same"), "denoise:canvas=6", PROMPTS[3]).output) == 6


@pytest.mark.parametrize("name", CONFIGS)
def test_the_end_of_the_text_ends_everything(name: str) -> None:
    """Position 8 is the end, and is sure before what stands in front of it."""
    law = by_position({place: 1 + place % 5 for place in range(30)} | {8: 10}, {8: 9.0})
    for spec in ("denoise:block=4", "threshold:threshold=0.99,block=4"):
        request = decode(oracle(name, law), spec, PROMPTS[3], end_ids=[10], max_tokens=20)
        assert (request.output, request.finish_reason) == ([1, 2, 3, 10], "stop")
        assert request.statistics.steps <= 8
        further = decode(oracle(name, law), spec, PROMPTS[3], end_ids=[10], max_tokens=20, ignore_eos=True)
        assert len(further.output) == 20
        assert further.output[:4] == request.output


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_final_is_handed_out_at_once(name: str) -> None:
    engine = Engine(oracle(name))
    (request,) = engine.add(PROMPTS[3], SamplingParams(max_tokens=11), "denoise:block=4,per_step=2")
    canvas, came = canvas_of(request), []
    for progress in engine.run():
        came += progress.tokens
        assert came == request.output
        stop = len(request.tokens)
        assert not canvas.masked[:stop].any()
        assert progress.finish_reason is not None or canvas.masked[stop]
    assert came == decode(oracle(name), "denoise:block=4,per_step=2", PROMPTS[3], max_tokens=11).output


def test_text_streams_and_stops(readable: Path) -> None:
    llm = LLM(readable, method="denoise:block=8", dtype="float32")
    prompt, params = "the cat and the moon", SamplingParams(max_tokens=24, ignore_eos=True)
    whole = llm.generate(prompt, params)[0]
    chunks = list(llm.stream(prompt, params))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert len(chunks) > 1
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = llm.generate(prompt, SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,)))[0].choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text.partition(stop)[0], "stop")
    # A letter is bought by its bias, in any position.
    bias = SamplingParams(max_tokens=5, ignore_eos=True, logit_bias={40: 100.0})
    assert llm.generate(prompt, bias)[0].token_ids == [40] * 5


@pytest.mark.parametrize("name", CONFIGS)
def test_aborted_in_the_middle(name: str) -> None:
    engine = Engine(oracle(name))
    kept, dropped = (
        engine.add(PROMPTS[3], SamplingParams(max_tokens=9), "denoise:block=4")[0],
        engine.add(PROMPTS[4], SamplingParams(max_tokens=9), "denoise:block=4")[0],
    )
    for _ in range(4):
        engine.step()
    engine.abort(dropped)
    assert (dropped.finish_reason, dropped.sequence.pending) == ("abort", 0)
    for _ in engine.run():
        pass
    assert engine.cache.used_bytes == 0
    assert kept.output == decode(oracle(name), "denoise:block=4", PROMPTS[3], max_tokens=9).output


# Figures, computed by hand


@pytest.mark.parametrize(
    ("name", "spec", "prompt", "figures", "committed_at"),
    [
        # Three passes over five positions; of the first block, the second position is the surer.
        ("full-same", "denoise:block=2", [1, 2], (3, 15, 0), [0, 0, 2, 1, 3]),
        ("full-same", "denoise:block=2,per_step=2", [1, 2], (2, 10, 0), [0, 0, 1, 1, 2]),
        ("full-same", "denoise:block=3,cache=dual", [1, 2], (3, 5 + 3 + 3, 0), [0, 0, 3, 2, 1]),
        ("full-shifted", "denoise:block=3,cache=dual", [1, 2], (3, 5 + 4 + 4, 0), [0, 0, 3, 2, 1]),
        # Five tokens are a block and the head of the next: what the first block predicts is known.
        ("block-causal-shifted", "denoise", [1, 2, 3, 4, 5], (3, 12, 4), [0, 0, 0, 0, 0, 3, 2, 1]),
        ("block-causal-same", "denoise", [1, 2, 3, 4, 5], (3, 12, 4), [0, 0, 0, 0, 0, 3, 2, 1]),
        # Reading the prompt gives the first token; then the surest is the last.
        ("context-causal-shifted", "denoise", [1, 2, 3], (4, 12, 3), [0, 0, 0, 1, 4, 3, 2]),
        ("context-causal-same", "denoise", [1, 2, 3], (4, 16, 3), [0, 0, 0, 4, 3, 2, 1]),
    ],
)
def test_figures(
    name: str, spec: str, prompt: list[int], figures: tuple[int, int, int], committed_at: list[int]
) -> None:
    law = by_position({}, {place: 1.0 + place for place in range(9)})
    request = decode(oracle(name, law), spec, prompt, max_tokens=3)
    statistics = request.statistics
    assert (statistics.steps, statistics.rows, statistics.prompt_rows) == figures
    assert canvas_of(request).committed_at.tolist() == committed_at
    assert statistics.tokens == 3
    assert request.kinds == (["accepted", "accepted", "plain"] if "per_step" in spec else ["plain"] * 3)


def test_finished_blocks_cost_a_pass_that_gives_the_next_token() -> None:
    """4 known tokens and blocks of 4: the prompt gives 4, three looks the rest, the block's end gives 8."""
    law = by_position({}, {place: 9.0 - place for place in range(9)})
    request = decode(oracle("block-causal-shifted", law), "denoise", [1, 2, 3, 4], max_tokens=5)
    statistics = request.statistics
    assert (statistics.steps, statistics.rows, statistics.prompt_rows) == (5, 16, 4)
    assert canvas_of(request).committed_at.tolist()[4:9] == [1, 2, 3, 4, 5]


# The cache's limit


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *[(name, "denoise:block=4") for name in CONFIGS],
        *[(name, "fast-dllm-v2:part=2,block_cache=true") for name in BLOCKS],
    ],
)
def test_canvases_wait_where_the_cache_is_full(name: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for the largest of them alone: all are filled as alone, one behind the other."""
    monkeypatch.setattr("hasten.cache.cache.MINIMUM_BLOCK", 1)
    needs = []
    for prompt in PROMPTS:
        roomy = Engine(oracle(name))
        roomy.add(prompt, SamplingParams(max_tokens=9), spec)
        for _ in roomy.run():
            pass
        needs.append(roomy.cache.peak_bytes)
    engine = Engine(oracle(name), cache_bytes=max(needs))
    requests = [engine.add(prompt, SamplingParams(max_tokens=9), spec)[0] for prompt in PROMPTS]
    for _ in engine.run():
        pass
    assert engine.cache.peak_bytes <= max(needs) < sum(needs)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        alone = decode(oracle(name), spec, prompt, max_tokens=9)
        assert request.output == alone.output
        assert canvas_of(request).committed_at.tolist() == canvas_of(alone).committed_at.tolist()
        assert request.statistics.rows == alone.statistics.rows


# What is refused


def test_refusals(readable: Path, llm: LLM) -> None:
    engine = Engine(oracle("full-same"))
    with pytest.raises(UserError, match="a constraint cannot be had from a model that fills masked positions"):
        LLM(readable).generate("the", SamplingParams(constraint=Constraint(regex="a+"), max_tokens=3))
    with pytest.raises(UserError, match="logprobs cannot be had"):
        engine.add([1], SamplingParams(logprobs=1), "denoise")
    for name in ("full-same", "block-causal-shifted"):
        with pytest.raises(UserError, match="ngram needs a model that predicts the next token"):
            Engine(oracle(name)).add([1], SamplingParams(), "ngram")
    for spec in ("denoise", "threshold", "freedave"):
        with pytest.raises(UserError, match=f"{spec} needs a model that fills masked positions"):
            llm.engine.add([1], SamplingParams(), spec)
    assert not engine.busy and engine.cache.used_bytes == 0


@pytest.mark.parametrize(
    ("spec", "clue"),
    [
        ("denoise:per_step=0", "per_step"),
        ("denoise:order=luck", "order"),
        ("denoise:block=0", "block"),
        ("denoise:cache=some", "cache"),
        ("denoise:refresh=-1", "refresh"),
        ("denoise:canvas=0", "canvas"),
        ("threshold:threshold=-1", "threshold"),
        ("factor:factor=-1", "factor"),
        ("freedave:drafts=0", "drafts"),
        ("freedave:order=random", "order"),
        ("freedave:cache=dual,refresh=2", "refresh"),
        ("localleap:relaxed=0.95", "relaxed"),
        ("localleap:radius=-1", "radius"),
        ("prophet:answer=0", "answer"),
        ("prophet:quantile=2", "quantile"),
        ("prophet:suffix=x", "tokenizer"),
        ("fast-dllm-v2:threshold=-1", "threshold"),
        ("fast-dllm-v2", "one block before the next"),
        ("learn2pd:floor=2", "floor"),
        ("learn2pd:part=2", "part"),
        ("learn2pd", "filter"),
        ("tidar", "tidar"),
    ],
)
def test_parameters_out_of_range(spec: str, clue: str) -> None:
    with pytest.raises(UserError, match=clue) as caught:
        Engine(oracle("full-same")).drafter(spec)
    assert "\n" not in str(caught.value)


def test_a_block_is_as_long_as_the_model_knows_it() -> None:
    """However long the parameters say, where the model has its own."""
    for name in BLOCKS:
        requests = [decode(oracle(name), f"denoise:block={block}", [1, 2], max_tokens=7) for block in (1, BLOCK, 32)]
        assert len({tuple(request.output) for request in requests}) == 1
