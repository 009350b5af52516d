"""The commands on models that fill masked positions: what they choose, show, and refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TEXT = "the cat and the moon"
SHORT = ("--max-tokens", "8")


@pytest.fixture(scope="module", params=["full", "block-causal"])
def canvas(request: pytest.FixtureRequest, diffusion_checkpoint: Callable[..., Path]) -> str:
    return str(diffusion_checkpoint(request.param))


@pytest.fixture(scope="module")
def full(diffusion_checkpoint: Callable[..., Path]) -> str:
    return str(diffusion_checkpoint("full"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("the cat and\nthe moon\nstars on water\nthe garden\n")
    return str(path)


def test_generate_streams_what_is_finished(hasten, canvas: str):
    document = hasten("generate", TEXT, "-m", canvas, *SHORT, "--method", "threshold:threshold=0.3", "--json").json()
    streamed = hasten("generate", TEXT, "-m", canvas, *SHORT, "--method", "threshold:threshold=0.3").out
    assert streamed == document["text"] + "\n"
    assert document["tokens_per_step"] == pytest.approx(len(document["token_ids"]) / document["steps"], abs=1e-4)
    two = hasten("generate", TEXT, "-m", canvas, *SHORT, "--temperature", "1", "--seed", "3", "--n", "2").out
    assert "--- 2 of 2" in two


def test_race_chooses_a_denoiser(hasten, canvas: str, tmp_path: Path):
    lanes = hasten("race", TEXT, "-m", canvas, *SHORT, "--rounds", "1", "--json").json()["lanes"]
    assert [lane["method"] for lane in lanes] == ["plain", "threshold"]
    for lane in lanes:
        assert lane["tokens_per_step"] == pytest.approx(lane["tokens"] / lane["steps"], abs=1e-4)
    command = ("race", TEXT, "-m", canvas, *SHORT, "--rounds", "1", "--method", "denoise:per_step=8")
    shown = hasten(*command, "--svg", str(tmp_path / "race.svg"))
    assert "identical: no (a lossy method)" in shown.out and (tmp_path / "race.svg").exists()


def test_race_chooses_tidar(hasten, diffusion_checkpoint: Callable[..., Path]):
    model = str(diffusion_checkpoint("context-causal"))
    document = hasten("race", TEXT, "-m", model, *SHORT, "--rounds", "1", "--json").json()
    assert [lane["method"] for lane in document["lanes"]] == ["plain", "tidar"] and document["identical"]


def test_verify(hasten, full: str, prompts: str):
    ran = hasten("verify", "-m", full, "--prompts", prompts, *SHORT)
    assert ran.status == 0 and "freedave: 4 of 4 prompts identical" in ran.out and "accepted" in ran.out
    ran = hasten("verify", "-m", full, "--prompts", prompts, *SHORT, "--method", "denoise:per_step=8")
    assert ran.status == 1 and "first divergence" in ran.out and "accepted" not in ran.out


def test_bench(hasten, full: str, prompts: str, tmp_path: Path):
    page = tmp_path / "page.html"
    document = hasten("bench", "-m", full, "--suite", prompts, *SHORT, "--report", str(page), "--json").json()
    assert {row["method"] for row in document["rows"]} == {"plain", "threshold"} and document["verify_cost"] is None
    for row in document["rows"]:
        assert row["rows_per_token"] > 1 and 0 <= row["agreement"] <= 1 and row["predicted_speedup"] is None
    assert "same tokens" in page.read_text()
    table = hasten("bench", "-m", full, "--suite", prompts, *SHORT).out
    assert "agrees" in table and "accepted" not in table


def test_tune(hasten, full: str, prompts: str):
    document = hasten("tune", "-m", full, "--prompts", prompts, *SHORT, "--seconds", "30", "--json").json()
    assert {row["method"].partition(":")[0] for row in document["candidates"]} == {"freedave"}
    assert {"method": "ngram", "reason": "not for this model's kind of plain decoding"} in document["skipped"]


def test_sweep_of_a_model(hasten, full: str, prompts: str):
    ran = hasten("sweep", "-m", full, "--suite", prompts, *SHORT, "--methods", "denoise", "--json").json()
    assert {row["decoder"] for row in ran["rows"]} == {"plain", "denoise"} and ran["ideal"] == []


def test_sweep_of_the_ideal_model(hasten, tmp_path: Path):
    page, picture = tmp_path / "page.html", tmp_path / "curves.svg"
    command = ("sweep", "--per-task", "2", "--methods", "factor,denoise:order=random")
    document = hasten(*command, "--report", str(page), "--picture", str(picture), "--json").json()
    assert document["command"].startswith("hasten sweep") and document["model"] == "oracle"
    assert {row["category"] for row in document["rows"]} >= {"copy", "shuffle", "overall"}
    assert {point["category"] for point in document["ideal"]} >= {"copy", "shuffle"}
    assert "<svg" in picture.read_text() and "ideal, random order" in page.read_text()
    table = hasten(*command, "--temperature", "0").out
    assert "denoise:order=random,per_step=2" in table and "theory" not in table


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("generate", TEXT, "--method", "ngram"), "ngram needs a model that predicts the next token"),
        (("generate", TEXT, "--method", "tidar"), "tidar needs a model"),
        (("generate", TEXT, "--logprobs", "1"), "logprobs cannot be had"),
        (("generate", TEXT, "--prompt-logprobs", "1"), "prompt_logprobs cannot be had"),
        (("generate", TEXT, "--min-tokens", "1"), "min_tokens cannot be had"),
        (("generate", TEXT, "--bad-word", "a"), "bad_words cannot be had"),
        (("generate", TEXT, "--regex", "[0-9]+"), "a constraint cannot be had"),
        (("race", TEXT, "--method", "suffix"), "suffix needs a model that predicts the next token"),
        (("verify", "--method", "ngram"), "ngram needs a model that predicts the next token"),
        (("bench", "--methods", "fast-dllm-v2", "--per-task", "1"), "fast-dllm-v2 needs a model that finishes"),
        (("sweep", "--methods", "learn2pd", "--suite", "parallelbench:copy", "--per-task", "1"), "learn2pd needs"),
    ],
)
def test_what_does_not_fit_is_refused(hasten, full: str, command: tuple[str, ...], words: str):
    ran = hasten(*command, "-m", full)
    assert (ran.status, ran.out) == (2, "") and words in ran.err and ran.err.count("\n") == 1


def test_denoisers_are_refused_by_other_models(hasten):
    for command in (
        ("generate", TEXT, "--method", "threshold"),
        ("sweep", "--methods", "threshold", "--per-task", "1"),
    ):
        ran = hasten(*command, "-m", "tiny")
        assert ran.status == 2 and "masked positions" in ran.err
