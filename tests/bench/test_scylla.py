"""Scylla's measuring and planning, on a random model and drafters that need no training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.bench import scylla
from hasten.bench.scylla import Acceptance, Family, acceptance, plan, predicted
from hasten.engine.cost import VerifyCost
from helpers import make_model

PROMPTS = ["the cat and the moon", "another morning reads", "stars and dances on water", "in the garden when"]
CURVE = VerifyCost((1, 2, 64), (64,), ((1.0, 1.1, 7.3),), 0.05)
CHEAP = VerifyCost((1, 2, 64), (64,), ((0.05, 0.051, 0.1),), 0.001)


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
    assert found.at_length(3) == 4 and found.at_length(6) == 7


def test_other_lengths_from_the_positions():
    accepted = Acceptance(1.0, 0.0, [0.5, 0.8])
    assert accepted.at_length(0) == 1
    assert accepted.at_length(1) == pytest.approx(1.5)
    assert accepted.at_length(3) == pytest.approx(1 + 0.5 + 0.4 + 0.32)


def test_plans_are_the_fastest_lengths():
    accepted = Acceptance(2.0, 0.0, [0.8, 0.8, 0.8, 0.8])
    lengths = plan(CURVE, CHEAP, accepted, [1, 4, 16], 4, 64)
    for batch, length in lengths.items():
        rates = [predicted(CURVE, CHEAP, accepted, batch, n, 64) for n in range(5)]
        assert rates[length] == max(rates)


def test_lengths_never_grow_with_the_batch_where_drafting_is_free():
    rng = random.Random(0)
    free = VerifyCost((1, 2), (64,), ((0.0, 0.0),), 0.0)
    for _ in range(200):
        slope = rng.uniform(0, 0.5)
        target = VerifyCost((1, 2), (64,), ((1.0, 1.0 + slope),), 0.0)
        accepted = Acceptance(1.0, 0.0, [rng.uniform(0.1, 0.95)] * 4)
        lengths = list(plan(target, free, accepted, [1, 2, 4, 8, 16, 32], 8, 64).values())
        assert lengths == sorted(lengths, reverse=True)


def test_embeddings_are_not_counted(tiny: Path):
    # Two layers: q and o 48 x 48, k and v 24 x 48, three MLP matrices 80 x 48.
    assert scylla.size_of(tiny) == 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48)


def test_the_whole_examination(llm: LLM, drafters: list[Path], monkeypatch):
    monkeypatch.setattr(scylla, "measure", lambda model: CURVE)
    monkeypatch.setattr(scylla, "ROUNDS", 1)
    # All have the same size; the axis needs different ones.
    monkeypatch.setattr(scylla, "size_of", lambda folder: 10 + drafters.index(folder))
    family = Family(list(zip((10, 100, 1000, 10000), drafters, strict=True)), list(enumerate(drafters, 1)))
    document = scylla.scylla(llm, family, PROMPTS, 2, [1, 2, 3, 4], 8)
    assert document["data"]["law"]["detected"] in (True, False)
    assert [point["x"] for point in document["batch"]["points"]] == [1, 2, 3, 4]
    text = scylla.render(document, "hasten train scylla")
    assert "training tokens" in text and text.count("\n| ") >= 8
    assert llm.engine.cache.used_bytes == 0
