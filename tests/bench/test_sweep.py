"""Decoders' knobs turned: the ideal model reaches the theory, and a model's rows are those of the comparison."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from scipy.stats import binomtest

from hasten import LLM, SamplingParams, UserError
from hasten.bench import plots, report
from hasten.bench.ideal import IdealModel, ideal_points
from hasten.bench.parallelbench import parallelbench
from hasten.bench.prompts import BenchPrompt
from hasten.bench.sweep import settings, sweep, wilson
from hasten.engine import Knob, methods, register, registry
from hasten.methods.diffusion.denoise import Denoise, DenoiseParameters
from hasten.tasks.parallelbench import SEVERAL_ANSWERS
from hasten.tasks.parallelbench.theory import accuracy

SAMPLED = SamplingParams(temperature=1.0, seed=1)


def of_length(operation: str, size: int) -> list[BenchPrompt]:
    asked = parallelbench(f"parallelbench-words:{operation}", 100)
    return [prompt for prompt in asked if len(prompt.question.problem.items) == size]


def test_settings_turn_the_knob_that_is_free():
    assert [each.method for each in settings("factor")] == [
        f"factor:factor={value}" for value in ("0.7", "1", "1.3", "1.6", "1.9")
    ]
    turned = settings("denoise:order=random")
    assert [each.value for each in turned] == [1, 2, 3, 4, 6, 8, 16, 32]
    assert turned[1].method == "denoise:order=random,per_step=2" and turned[1].decoder == "denoise:order=random"
    assert [each.method for each in settings("threshold:threshold=0.3")] == ["threshold:threshold=0.3"]
    assert [each.method for each in settings("plain")] == ["plain"]
    assert settings("prophet")[0].method == "prophet:early=30,middle=20,late=10"
    assert [each.method for each in settings("prophet:middle=4")] == ["prophet:middle=4"]
    for slug, method in methods().items():
        assert (method.role == "denoiser" or method.exactness == "lossy") == (method.knob is not None)
        if method.knob is not None:
            assert [each.value for each in settings(slug)] == list(method.knob.values)
    with pytest.raises(UserError, match="no parameter 'heat'"):
        settings("factor:heat=1")


@pytest.mark.parametrize("operation", ["copy", "insert_random", "replace_random", "shuffle"])
def test_the_ideal_model_reaches_the_theory(operation: str):
    """By the real decoder, in random order: a hundred answers to 25 questions, within three standard deviations."""
    prompts = of_length(operation, 3)
    points = {point["per_step"]: point for point in ideal_points(prompts)}
    for per_step in (1, 2, 4):
        point = points[min(per_step, max(points))]
        right = []
        for number, prompt in enumerate(prompts):
            model = IdealModel(prompt)
            for seed in range(4):
                params = SamplingParams(max_tokens=model.length, temperature=1.0, seed=100 * number + seed)
                request, grade = model.decode(f"denoise:order=random,per_step={per_step}", params)
                assert request.statistics.steps == math.ceil(model.length / per_step)
                right.append(grade)
        expected = point["accuracy"]
        spread = math.sqrt(expected * (1 - expected) / len(right))
        assert abs(sum(right) / len(right) - expected) <= 3 * spread + 1e-9
        if per_step == 1 or operation == "copy":
            assert expected == 1


def test_the_theory_is_that_of_the_tasks():
    points = ideal_points(of_length("replace_random", 6))
    assert [point["per_step"] for point in points] == [1, 2, 3, 4, 5, 6]
    for point in points:
        assert point["accuracy"] == pytest.approx(accuracy("replace_random", 6, point["per_step"]), abs=1e-4)
        assert point["tokens_per_step"] == pytest.approx(6 / math.ceil(6 / point["per_step"]), abs=1e-4)
    # All orders but the one given are right. Counted: the product of the marginals, over these orders.
    for size in (3, 4):
        orders = [order for order in permutations(range(size)) if order != tuple(range(size))]
        shares = [
            [sum(order[i] == item for order in orders) / len(orders) for item in range(size)] for i in range(size)
        ]
        counted = sum(math.prod(shares[i][item] for i, item in enumerate(order)) for order in orders)
        assert ideal_points(of_length("shuffle", size))[size - 1]["accuracy"] == pytest.approx(counted, abs=1e-4)
        assert abs(counted - accuracy("shuffle", size, size)) > 1e-3


def test_greedy_decoding_of_the_ideal_model_by_one_is_always_right():
    prompts = parallelbench("parallelbench-words:random,copy", 4)
    measured = sweep(None, ["plain", "threshold"], prompts, SamplingParams(), lambda done: None)
    rows = {(row["method"], row["category"]): row for row in measured["rows"]}
    for category in (*SEVERAL_ANSWERS, "copy", "overall"):
        assert rows["plain", category]["accuracy"] == rows["plain", category]["tokens_per_step"] == 1
    # Everything that is certain is filled at once.
    assert rows["threshold:threshold=0.9", "copy"]["tokens_per_step"] > 3
    assert rows["threshold:threshold=0.9", "copy"]["accuracy"] == 1
    assert rows["plain", "copy"]["rows_per_token"] > 1 and rows["plain", "copy"]["agreement"] is None


def test_a_third_partys_decoder_is_swept_as_ours_are():
    @register(
        "a-denoiser", aliases=("another-name",), role="denoiser", family="diffusion", exactness="lossy", paper="",
        title="Denoising", parameters=DenoiseParameters, knob=Knob("per_step", (1, 3)),
    )  # fmt: skip
    class Ours(Denoise):
        """Another decoder of the same kind."""

    try:
        assert [each.method for each in settings("another-name")] == [
            "another-name:per_step=1",
            "another-name:per_step=3",
        ]
        rows = sweep(None, None, parallelbench("parallelbench-words:copy", 1), SamplingParams())["rows"]
    finally:
        registry._METHODS.pop("a-denoiser")
    assert {row["method"] for row in rows if row["decoder"] == "a-denoiser"} == {
        "a-denoiser:per_step=1", "a-denoiser:per_step=3",
    }  # fmt: skip


def test_what_the_ideal_model_cannot_do_is_left_out_or_refused():
    prompts = parallelbench("parallelbench:copy", 1)
    skipped = {entry["method"] for entry in sweep(None, None, prompts, SAMPLED)["skipped"]}
    assert skipped == {"learn2pd", "fast-dllm-v2", "nbdiff"}
    with pytest.raises(UserError, match="next token"):
        sweep(None, ["ngram"], prompts, SAMPLED)
    with pytest.raises(UserError, match="list operations"):
        sweep(None, None, parallelbench("parallelbench:sudoku_n4_12", 1), SAMPLED)


def test_a_models_rows(diffusion_llm: Callable[..., LLM]):
    llm = diffusion_llm("full")
    prompts = [BenchPrompt("words", "words", "the cat and the moon", lambda text: 0.5)]
    done: list[int] = []
    measured = sweep(llm, ["denoise", "freedave:drafts=2"], prompts, SamplingParams(max_tokens=8), done.append)
    rows = {row["method"]: row for row in measured["rows"] if row["category"] == "overall"}
    assert list(rows) == ["plain", *(each.method for each in settings("denoise")), "freedave:drafts=2"]
    plain, eight = rows["plain"], rows["denoise:per_step=8"]
    assert rows["denoise:per_step=1"] | {"speedup": 1} == plain | {
        "method": "denoise:per_step=1", "decoder": "denoise", "knob": "per_step", "value": 1, "speedup": 1,
    }  # fmt: skip
    assert eight["accuracy"] == 0.5 and eight["tokens_per_step"] > plain["tokens_per_step"]
    assert rows["freedave:drafts=2"]["agreement"] == plain["agreement"] == 1 and eight["agreement"] <= 1
    assert sum(done) == 1
    assert plain["accuracy_interval"] == list(wilson(0.5, 1))
    ungraded = sweep(llm, ["freedave:drafts=2"], [replace(prompts[0], grade=None)], SamplingParams(max_tokens=8))
    assert {row["accuracy_interval"] for row in ungraded["rows"]} == {None}


def test_models_that_predict_the_next_token_have_decoders_of_their_own(llm: LLM, tmp_path: Path):
    """Those that fit the model; without more than a token a step, the picture goes by speed-up."""
    prompts = [BenchPrompt("words", "words", "the cat and the moon", lambda text: float("a" in text))]
    measured = sweep(llm, None, prompts, SamplingParams(max_tokens=4))
    slugs = {row["decoder"] for row in measured["rows"]} | {entry["method"] for entry in measured["skipped"]}
    turned = {slug for slug, method in registry.decoders().items() if method.knob and method.role == "drafter"}
    assert slugs == {"plain"} | turned >= {"skipdecode", "ffn-skipllm"}
    named = [row for row in measured["rows"] if row["decoder"] == "skipdecode"]
    assert {row["tokens_per_step"] for row in named} == {1}
    assert "speed-up" in words_of(plots.tradeoffs(named)) and "tokens per step" not in words_of(plots.tradeoffs(named))


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 60), (60, 60), (57, 60), (30, 56), (1, 1000)])
def test_intervals_are_wilsons(right: int, count: int):
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-4)


def words_of(svg: str) -> set[str | None]:
    return {element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")}


def test_the_picture_and_the_page(tmp_path: Path):
    prompts = parallelbench("parallelbench-words:copy,shuffle", 4)
    document = {
        "model": "oracle", "suite": "parallelbench-words", "command": "hasten sweep --a 'b'", "temperature": 1.0,
        **sweep(None, ["factor", "denoise:order=random"], prompts, SAMPLED), "ideal": ideal_points(prompts),
    }  # fmt: skip
    svg = plots.tradeoffs(document["rows"], document["ideal"])
    assert {"copy", "shuffle", "overall", "factor", "denoise:order=random", "ideal, random order"} <= words_of(svg)
    report.write_sweep(document, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert svg in page and "hasten sweep --a &#x27;b&#x27;" in page and "ideal model" in page
    assert page.count("<td>denoise:order=random,per_step=2</td>") == 3
    assert f"{100 * wilson(1, 8)[0]:.0f} to 100 %" in page
    assert "ideal model" not in report.render_sweep(document | {"ideal": []})
    alike = [row | {"decoder": f"{row['decoder'].partition(':')[0]}:block=8,part=4"} for row in document["rows"]]
    assert {"factor", "denoise"} <= words_of(plots.tradeoffs(alike))
