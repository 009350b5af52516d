"""Learn2PD's training: what is looked at, which prompts are held out, and that rightness is learned."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hasten import LLM, UserError
from hasten.engine import Engine, SamplingParams
from hasten.methods.diffusion.block_denoiser import BlockParameters
from hasten.methods.diffusion.learn2pd import load_filter
from hasten.model import CanvasOracle, DiffusionConfig
from hasten.train.learn2pd import FilterConfig, Look, Replay, _replay, fit, train_filter

BLOCK, WIDTH, MASK, END, WORD = 4, 16, 9, 8, 3
FAST = FilterConfig(epochs=1000, lr=1e-2)


def look(
    prompt: int, confidences: list[float], right: list[bool], ends: tuple[int, ...] = (), known: int = WIDTH
) -> Look:
    inside = torch.arange(WIDTH) < known
    return Look(
        (prompt,),
        torch.tensor(confidences),
        torch.tensor(right) & inside,
        inside,
        inside,
        torch.tensor([place in ends for place in range(WIDTH)]),
    )


def sure_and_right(prompts: int) -> list[Look]:
    """A prediction is right where its confidence is above 0.7."""
    rng = random.Random(0)
    draws = [[rng.choice((0.1, 0.3, 0.9, 0.95)) for _ in range(WIDTH)] for _ in range(10 * prompts)]
    return [look(number % prompts, row, [value > 0.7 for value in row]) for number, row in enumerate(draws)]


# What is looked at


@pytest.mark.parametrize(
    "diffusion",
    [DiffusionConfig("full", "same", MASK), DiffusionConfig("context-causal", "same", MASK, BLOCK)],
    ids=["full", "context-causal"],
)
def test_nothing_is_recorded_behind_the_end(diffusion: DiffusionConfig) -> None:
    """The text is five words and an end on a canvas of sixteen: two of four blocks are looked at."""

    def law(seen: tuple[tuple[int, int], ...], position: int) -> torch.Tensor:
        logits = torch.zeros(MASK + 1)
        logits[END if position >= 2 + 5 else WORD] = 5.0
        return logits

    engine = Engine(CanvasOracle(law, MASK + 1, diffusion), end_ids=[END])
    replay = Replay(engine.target, BlockParameters(block=BLOCK), BLOCK)
    _replay(engine, replay, [1, 2], SamplingParams(max_tokens=16), BLOCK)
    first, second = replay.looks
    assert first.prompt == second.prompt == (1, 2)
    assert first.known.all() and first.masked.all() and first.right.all() and not first.ends.any()
    # The canvas ends within the second block: what is behind the end is neither right nor wrong.
    for column in (second.known, second.masked, second.right):
        assert column.tolist() == [True, True, False, False]
    assert second.ends.tolist() == [False, True, True, True]
    assert (second.confidences > 0.9).all()


# What is held out, and what is learned


def test_no_prompt_is_on_both_sides() -> None:
    """Confidences and rightness by lot, the same at each of a prompt's looks: known only to who has seen the prompt."""
    rng = random.Random(0)
    looks = []
    for prompt in range(40):
        confidences = [rng.random() for _ in range(WIDTH)]
        right = [rng.random() < 0.5 for _ in range(WIDTH)]
        looks += [look(prompt, confidences, right)] * 25
    figures = fit(looks, FilterConfig(epochs=2000, lr=3e-2))[1]
    assert figures["loss"] < 0.4 and figures["recall"] < 0.3


def test_rightness_is_learned() -> None:
    figures = fit(sure_and_right(30), FAST)[1]
    assert figures["loss"] < 0.1 and figures["precision"] > 0.9 and figures["recall"] > 0.7


def test_the_end_of_the_text_is_reported_apart() -> None:
    """At the last place the text seems to end, surely and always wrongly; elsewhere what is sure is right."""
    looks = [
        look(
            each.prompt[0],
            [*each.confidences[:-1].tolist(), 0.9],
            [*each.right[:-1].tolist(), False],
            ends=(WIDTH - 1,),
        )
        for each in sure_and_right(30)
    ]
    figures = fit(looks, FAST)[1]
    assert figures["precision"] > 0.9 and figures["recall"] > 0.7
    assert figures["end_precision"] == figures["end_recall"] == 0
    ends = [look(each.prompt[0], each.confidences.tolist(), each.right.tolist(), tuple(range(WIDTH))) for each in looks]
    figures = fit(ends, FAST)[1]
    assert figures["precision"] == figures["recall"] == 0 and figures["end_precision"] > 0.9


@pytest.mark.parametrize("masked_only", [True, False])
def test_what_the_reference_does_not_know_has_no_loss(masked_only: bool) -> None:
    """Whatever is said of positions behind the end, the same is learned."""
    one = [
        look(each.prompt[0], each.confidences.tolist(), each.right.tolist(), known=WIDTH // 2)
        for each in sure_and_right(30)
    ]
    other = [
        Look(each.prompt, each.confidences, each.right ^ ~each.known, each.known, each.masked, each.ends)
        for each in one
    ]
    first, second = (fit(looks, FilterConfig(epochs=20, masked_only=masked_only))[0] for looks in (one, other))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(UserError, match="fewer than two different prompts"):
        fit([look(0, [0.5] * WIDTH, [True] * WIDTH)] * 20, FAST)


# The whole of it


def test_a_filter_is_trained_and_written(diffusion_llm: Callable[..., LLM], tmp_path: Path) -> None:
    llm = diffusion_llm("full")
    done: list[int] = []
    config = FilterConfig(prompts=12, block=BLOCK, canvas=12, epochs=40)
    summary = train_filter(llm, config, tmp_path / "made" / "filter.safetensors", done.append)
    assert sum(done) == 12 and summary["block"] == BLOCK and summary["records"] >= 12
    assert {"loss", "precision", "recall", "end_precision", "end_recall"} < summary.keys()
    written = load_filter(Path(summary["output"]))
    again = train_filter(llm, config, tmp_path / "again.safetensors")
    assert again == {**summary, "output": str(tmp_path / "again.safetensors")}
    same = zip(written.parameters(), load_filter(tmp_path / "again.safetensors").parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    (answer,) = llm.generate(["the cat"], SamplingParams(max_tokens=8), f"learn2pd:filter={summary['output']}")
    assert answer.token_ids


def test_other_models_have_no_filter(llm: LLM) -> None:
    with pytest.raises(UserError, match="fills masked positions"):
        train_filter(llm, FAST)
