"""Files of prompts: what they become, and what is wrong with a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten import UserError
from hasten.bench.prompts import load_prompts, spread


def test_text_and_json_lines(tmp_path: Path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [item.prompt for item in load_prompts(text)] == ["one", "two"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "category": "x"}\n{"prompt": "b"}\n')
    assert [item.category for item in load_prompts(lines)] == ["x", "file"]


def test_a_line_ends_where_json_says(tmp_path: Path):
    """Unicode has more ends of lines, which may stand within a string."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}', encoding="utf-8")
    assert [item.prompt for item in load_prompts(lines)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))])
def test_few_of_many_are_spread_over_them(count: int, chosen: list[int]):
    assert spread(range(10), count) == chosen


def test_every_turn_of_a_conversation_is_a_prompt(tmp_path: Path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"turns": ["a", "b", "c"], "category": "talk"}) + '\n{"prompt": "d"}\n')
    loaded = load_prompts(lines)
    assert [item.prompt for item in loaded] == ["a", "b", "c", "d"]
    assert [item.turns for item in loaded] == [("a",), ("a", "b"), ("a", "b", "c"), ()]
    assert [item.category for item in loaded] == ["talk"] * 3 + ["file"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "not JSON"),
        ("[1]", "'prompt'"),
        ('{"prompt": ""}', "'prompt'"),
        ('{"text": "a"}', "'prompt'"),
        ('{"turns": []}', "'turns'"),
        ('{"turns": ["a", ""]}', "'turns'"),
        ('{"turns": "a"}', "'turns'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2") as error:
        load_prompts(lines)
    assert words in str(error.value)


def test_other_line_ends_may_stand_within_a_string(tmp_path):
    file = tmp_path / "prompts.jsonl"
    text = "one\u2028two\u2029three\x85four"
    file.write_text("\ufeff" + json.dumps({"prompt": text, "category": "[/bold]\x1b"}, ensure_ascii=False) + "\n")
    (prompt,) = load_prompts(file)
    assert (prompt.prompt, prompt.category) == (text, "[/bold]�")
