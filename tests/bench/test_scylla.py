"""Scylla's measuring and fitting, on a random model and drafters that need no training."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.bench import scylla
from hasten.bench.scylla import Acceptance, Family, acceptance
from helpers import make_model

PROMPTS = ["the cat and the moon", "another morning reads", "stars and dances on water", "in the garden when"]


@pytest.fixture(scope="module")
def drafters(tmp_path_factory, tiny: Path) -> list[Path]:
    """Copies of the target, each noisier than the one before: a family whose quality is known in order."""
    folders = []
    for number, noise in enumerate((0.4, 0.2, 0.1, 0.02)):
        folder = tmp_path_factory.mktemp("family") / f"drafter-{number}"
        make_model(noise).save_pretrained(folder)
        for file in tiny.glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        folders.append(folder)
    return folders


def test_tokens_per_step_is_tokens_over_steps(llm: LLM, drafters: list[Path]):
    found = acceptance(llm, drafters[-1], PROMPTS, 3, 20)
    generations = llm.generate(PROMPTS, SamplingParams(max_tokens=20), scylla.method(drafters[-1], 3))
    counted = [generation.choices[0].statistics for generation in generations]
    # The first token of a prompt comes without a draft.
    tokens, steps = sum(each.tokens - 1 for each in counted), sum(each.steps - 1 for each in counted)
    assert found.tokens_per_step == pytest.approx(tokens / steps) and found.error >= 0
    assert len(found.positions) == 3 and all(0 <= rate <= 1 for rate in found.positions)


def test_better_drafters_are_measured_as_better(llm: LLM, drafters: list[Path]):
    rates = [acceptance(llm, drafter, PROMPTS, 3, 24).tokens_per_step for drafter in drafters]
    assert rates[0] < rates[-1]


def test_a_perfect_drafter(llm: LLM, tiny: Path):
    found = acceptance(llm, tiny, PROMPTS, 3, 24)
    assert found.positions == [1.0, 1.0, 1.0]
    # The last step of a text is cut short.
    assert 3.5 < found.tokens_per_step < 4


def test_embeddings_are_not_counted(tiny: Path):
    # Two layers: q and o 48 x 48, k and v 24 x 48, three MLP matrices 80 x 48.
    assert scylla.size_of(tiny) == 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48)


def examine(monkeypatch, llm: LLM, drafters: list[Path], planted: list[float], speeds: dict[int, list[float]]) -> dict:
    """The whole of it, with figures that are known: tokens per step by drafter, and by batch tokens per second."""
    rates = dict(zip(drafters, planted, strict=True))
    monkeypatch.setattr(scylla, "acceptance", lambda llm, folder, *rest: Acceptance(rates[folder], 0.01, [0.5, 0.5]))
    monkeypatch.setattr(scylla, "throughput", lambda llm, specs, prompts, batch, tokens: speeds[batch])
    # All have the same size; the axis needs different ones.
    monkeypatch.setattr(scylla, "size_of", lambda folder: 10 ** (1 + drafters.index(folder)))
    family = Family(list(zip((10, 100, 1000, 10000), drafters, strict=True)), list(enumerate(drafters, 1)))
    return scylla.scylla(llm, family, PROMPTS, 2, list(speeds), 8)


def test_what_is_planted_is_found(llm: LLM, drafters: list[Path], monkeypatch):
    """A line in the logarithm is detected, with its slope and form; a batch's fastest length is that of its rates."""
    speeds = {1: [10.0, 12.0, 15.0], 10: [20.0, 24.0, 22.0], 100: [30.0, 29.0, 28.0], 1000: [40.0, 39.0, 37.0]}
    document = examine(monkeypatch, llm, drafters, [1.0, 1.5005, 1.9995, 2.5], speeds)
    for axis in ("data", "capacity"):
        law = document[axis]["law"]
        assert law["detected"] is True
        assert law["slope_per_decade"] == pytest.approx(0.5, abs=1e-3)
        assert law["forms"]["log-linear"]["r2"] > 0.9999 > 0.5 > law["forms"]["constant"]["r2"]
    points = document["batch"]["points"]
    assert [point["fastest_length"] for point in points] == [2, 1, 0, 0]
    assert [point["speedup"] for point in points] == pytest.approx([15 / 10, 22 / 20, 28 / 30, 37 / 40])
    text = scylla.render(document, "hasten train scylla")
    assert "| training tokens | tokens per step | 0.5 |" in text and "| 10 | 1.10 | 1 |" in text
    assert document["best_drafter"] == str(drafters[-1])


def test_what_is_not_there_is_not_found(llm: LLM, drafters: list[Path], monkeypatch):
    flat = {batch: [10.0, 12.0, 12.0 + 0.1 * (number % 2)] for number, batch in enumerate((1, 2, 4, 8))}
    document = examine(monkeypatch, llm, drafters, [2.0, 1.99, 2.01, 2.0], flat)
    for law in (document["data"]["law"], document["capacity"]["law"], document["batch"]["speedup_law"]):
        assert law["detected"] is False and law["best_form"] == "constant"
        assert law["interval"][0] < 0 < law["interval"][1]
    assert "(no effect detected)" in scylla.render(document, "hasten train scylla")


def test_the_whole_examination_runs(llm: LLM, drafters: list[Path], monkeypatch):
    monkeypatch.setattr(scylla, "ROUNDS", 1)
    monkeypatch.setattr(scylla, "size_of", lambda folder: 10 + drafters.index(folder))
    family = Family(list(zip((10, 100, 1000, 10000), drafters, strict=True)), list(enumerate(drafters, 1)))
    document = scylla.scylla(llm, family, PROMPTS, 2, [1, 2, 3, 4], 8)
    measured = [acceptance(llm, drafter, PROMPTS, 2, 8).tokens_per_step for drafter in drafters]
    assert [point["tokens_per_step"] for point in document["data"]["points"]] == measured
    assert [point["x"] for point in document["batch"]["points"]] == [1, 2, 3, 4]
    assert all(point["tokens_per_second"] > 0 for point in document["batch"]["points"])
    assert llm.engine.cache.used_bytes == 0
