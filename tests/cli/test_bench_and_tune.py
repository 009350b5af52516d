"""The measuring commands as a user runs them: documents, the report, and what they refuse."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest

from hasten import LLM
from hasten.bench.compare import WARM_UP
from hasten.engine import Engine
from hasten.model.checkpoint import resolve

PROMPTS = [f"Copy the list: red cat {word} salt red cat sun\nAnswer:" for word in ("moon", "tree", "road", "fish")]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS))
    return str(path)


def assert_refused(ran, *words: str) -> None:
    assert ran.status == 2 and ran.out == ""
    assert ran.err.startswith("hasten: ") and ran.err.count("\n") == 1, ran.err
    for word in words:
        assert word in ran.err


def test_bench_document_and_report(hasten, tmp_path: Path):
    page = tmp_path / "report.html"
    options = ("--suite", "spec", "--per-task", "1", "--max-tokens", "8", "--report", str(page))
    ran = hasten("bench", "--methods", "ngram", *options, "--json")
    document = ran.json()
    assert document.keys() >= {"model", "suite", "command", "machine", "verify_cost", "rows"}
    assert document["verify_cost"]["1"] == 1 and document["command"].startswith("hasten bench --methods ngram")
    assert len(document["rows"]) == 2 * 7
    for row in document["rows"]:
        assert row.keys() >= {
            "method", "category", "tokens_per_step", "tokens_per_second", "speedup", "accuracy", "accepted_per_step",
            "draft_us_per_step", "draft_overhead", "accepted_histogram", "time_split", "memory_bytes",
            "predicted_speedup", "decode_speedup", "speedup_of_rates",
        }  # fmt: skip
    assert page.read_text().startswith("<!doctype html>") and "--suite spec" in page.read_text()


def test_bench_of_a_conversation(hasten, tmp_path: Path):
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"turns": ["Copy the list: red cat", "Copy the list: moon salt"], "category": "talk"}))
    rows = hasten("bench", "--suite", str(talk), "--max-tokens", "4", "--json").json()["rows"]
    assert {(row["category"], row["prompts"]) for row in rows} == {("talk", 2), ("overall", 2)}
    assert hasten("verify", "--prompts", str(talk), "--max-tokens", "4", "--json").json()["prompts"] == 2
    talk.write_text(f"{talk.read_text()}\n" * 3)
    limited = ("verify", "--prompts", str(talk), "--max-tokens", "4", "--json", "--limit")
    assert hasten(*limited, "2").json()["prompts"] == 4
    assert "limit must be at least 1" in hasten(*limited, "0").err


def test_spec_bench(hasten, tmp_path: Path):
    lines = [{"category": "writing", "turns": ["Copy the list: red cat", "Copy the list: moon salt"]}]
    lines += [{"category": category, "turns": [text]} for category in ("qa", "rag") for text in PROMPTS]
    questions = tmp_path / "question.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    command = ("bench", "--suite", "spec-bench", "--prompts", str(questions), "--limit", "2", "--max-tokens", "6")
    document = hasten(*command, "--temperature", "1", "--json").json()
    assert document["temperature"] == 1 and document["suite"] == "spec-bench"
    plain = {row["category"]: row for row in document["rows"] if row["method"] == "plain"}
    assert {name: (row["questions"], row["prompts"]) for name, row in plain.items()} == {
        "mt_bench": (1, 2), "qa": (2, 2), "rag": (2, 2), "overall": (5, 6)
    }  # fmt: skip
    for row in document["rows"]:
        assert row.keys() >= {"mean_accepted_tokens", "speedup_of_rates"} and row["identical"] == row["prompts"]
    above, head, *lines = hasten(*command, "--methods", "ngram,suffix").out.splitlines()
    assert above.split() == ["multi-turn", "QA", "RAG", "overall"] and head.split()[0] == "method"
    assert [line.split()[0] for line in lines] == ["plain", "ngram", "suffix"]
    assert {len(line.split()) for line in lines} == {1 + 2 * 4 + 1}


def test_bench_at_several_temperatures(hasten, prompts: str, tmp_path: Path):
    command = ("bench", "--prompts", prompts, "--limit", "1", "--max-tokens", "4", "--methods", "ngram")
    document = hasten(*command, "--temperature", "1,0", "--json").json()
    assert document["temperature"] is None
    rows = [(row["temperature"], row["method"], row["category"]) for row in document["rows"]]
    alone = hasten(*command, "--temperature", "1", "--json").json()
    assert alone["temperature"] == 1 and {row["temperature"] for row in alone["rows"]} == {1}
    names = [(row["method"], row["category"]) for row in alone["rows"]]
    assert rows == [(temperature, *name) for temperature in (0, 1) for name in names]
    lines = hasten(*command, "--temperature", "0,1").out.splitlines()
    assert [line for line in lines if line.startswith("temperature")] == ["temperature 0", "temperature 1"]
    page = str(tmp_path / "page.html")
    for wrong, reason in (
        (("warm",), "must be a number, or several"),
        (("0,-1",), "must be between 0 and 100"),
        (("1,0", "--samples", "2"), "need a temperature above 0"),
        (("0,1", "--report", page), "a report is of one temperature"),
    ):
        refused = hasten(*command, "--temperature", *wrong)
        assert refused.status == 2 and reason in refused.err


def test_a_file_of_prompts_is_a_suite(hasten, prompts: str):
    document = hasten("bench", "--prompts", prompts, "--limit", "1", "--max-tokens", "2", "--json").json()
    assert document["suite"] == prompts and document["rows"][-1]["prompts"] == 1


def test_prompts_that_a_user_says(hasten, prompts: str, monkeypatch: pytest.MonkeyPatch):
    """The shipped template adds what the prompts of the shipped tasks end with: its model knows the answers then."""
    bare = Path(prompts).with_name("bare.jsonl")
    bare.write_text("\n".join(json.dumps({"prompt": text.removesuffix("\nAnswer:")}) for text in PROMPTS))
    read: list[list[int]] = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda *given, **more: read.append(list(given[1])) or add(*given, **more))
    llm = LLM("tiny")
    warm_up, templated = llm.encode(WARM_UP), [llm.encode(text) for text in PROMPTS]
    for command in (
        ("bench", "--prompts", str(bare), "--max-tokens", "1"),
        ("verify", "--prompts", str(bare), "--max-tokens", "1"),
        ("tune", "--prompts", str(bare), "--max-tokens", "1", "--candidates", "ngram"),
        ("race", PROMPTS[0].removesuffix("\nAnswer:"), "--max-tokens", "1", "--rounds", "1"),
        ("generate", PROMPTS[0].removesuffix("\nAnswer:"), "--max-tokens", "1"),
    ):
        read.clear()
        ran = hasten(*command, "--chat", "--json")
        assert ran.status == 0
        asked = [ids for ids in read if ids != warm_up]
        assert asked and all(ids in templated for ids in asked), command
        assert command[0] != "tune" or ran.json()["command"].endswith(" --chat")


def test_a_template_must_be_there(hasten, prompts: str, tmp_path: Path):
    folder = Path(shutil.copytree(resolve("tiny"), tmp_path / "untemplated"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for command in (
        ("bench", "--prompts", prompts), ("verify", "--prompts", prompts), ("tune", "--prompts", prompts),
        ("race", PROMPTS[0]), ("generate", PROMPTS[0]),
    ):  # fmt: skip
        assert_refused(hasten(*command, "--model", str(folder), "--chat"), "has no chat template")


def test_bench_refuses(hasten, tmp_path: Path):
    assert_refused(hasten("bench", "--suite", "spec-bench"), "--prompts FILE", "hemingkx/Spec-Bench")
    assert_refused(hasten("bench", "--suite", "tasks", "--prompts", "some.jsonl"), "prompts of its own")
    assert_refused(hasten("bench", "--limit", "0"), "at least 1")
    assert_refused(hasten("bench", "--report", str(tmp_path / "none" / "page.html")), "folder that exists")
    assert_refused(hasten("bench", "--per-task", "0"), "at least 1")


def test_a_report_needs_matplotlib(hasten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(hasten("bench", "--report", str(tmp_path / "page.html")), "hasten[plots]")


def test_tune(hasten, prompts: str):
    command = ("tune", "--prompts", prompts, "--candidates", "ngram,ngram:length=3", "--max-tokens", "12")
    document = hasten(*command, "--json").json()
    assert document["choice"] in ("plain", "ngram", "ngram:length=3")
    assert document["command"].endswith(f"--method {document['choice']}")
    assert {entry["method"] for entry in document["candidates"]} == {"ngram", "ngram:length=3"}
    for entry in document["candidates"]:
        assert entry.keys() >= {"method", "speedup", "tokens_per_step", "prompts", "rung"}
    assert document["interrupted"] is False
    table = hasten(*command).out
    assert "choice: " in table and "use it: hasten generate" in table and "ngram:length=3" in table


def test_tune_tells_what_is_known_when_it_is_stopped(hasten, prompts: str, monkeypatch: pytest.MonkeyPatch):
    from hasten.bench import tune

    def stopped(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune._Search, "choose", stopped)
    ran = hasten("tune", "--prompts", prompts, "--candidates", "ngram", "--json")
    assert ran.status == 130
    assert ran.json()["interrupted"] is True and ran.json()["choice"] == "plain"


def test_tune_refuses(hasten, prompts: str, tmp_path: Path):
    assert_refused(hasten("tune"), "--prompts")
    assert_refused(hasten("tune", "--prompts", str(tmp_path / "none.jsonl")), "none.jsonl")
    assert_refused(hasten("tune", "--prompts", prompts, "--seconds", "0"), "seconds must be positive")
    assert_refused(hasten("tune", "--prompts", prompts, "--candidates", "ngrm"), "unknown method 'ngrm'", "ngram")
    assert_refused(hasten("tune", "--prompts", prompts, "--candidates", "draft-model:model=none"), "none")
    single = tmp_path / "single.txt"
    single.write_text("one prompt\n")
    assert_refused(hasten("tune", "--prompts", str(single)), "at least 2 prompts")
    single.write_text("word " * 3000 + "\nshort\n")
    assert_refused(hasten("tune", "--prompts", str(single), "--candidates", "ngram"), "no room in the context")
