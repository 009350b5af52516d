"""Files of prompts and conversations: what they become, and what is wrong with a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams, UserError
from hasten.bench.prompts import BenchPrompt, encode, load_prompts

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def test_text_and_json_lines(tmp_path: Path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [item.prompt for item in load_prompts(text)] == ["one", "two"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "category": "x"}\n{"prompt": "b"}\n')
    assert [item.category for item in load_prompts(lines)] == ["x", "file"]


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


def conversation(*turns: str) -> list[BenchPrompt]:
    return [BenchPrompt("talk", "talk", turn, None, turns[: place + 1]) for place, turn in enumerate(turns)]


def test_answers_between_turns_are_plain_decodings_own(llm: LLM):
    asked = ["the cat", "and the moon", "sing"]
    got = encode(llm, [*conversation(*asked), BenchPrompt("", "", "the stars", None)], PARAMS)
    messages: list[dict[str, str]] = []
    for turn, ids in zip(asked, got, strict=False):
        messages.append({"role": "user", "content": turn})
        assert ids == llm.apply_chat_template(messages)
        messages.append({"role": "assistant", "content": llm.generate(ids, PARAMS)[0].text.strip()})
    assert len(got) == 4 and got[3] == llm.encode("the stars")
    assert got[2][: len(got[0])] == got[0]


def test_without_a_chat_template_texts_are_joined(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    first, second = encode(llm, conversation("the cat", "sing"), PARAMS)
    answer = llm.generate([first], PARAMS)[0].text.strip()
    assert first == llm.encode("the cat")
    assert second == llm.encode(f"the cat\n\n{answer}\n\nsing")


def test_other_line_ends_may_stand_within_a_string(tmp_path):
    file = tmp_path / "prompts.jsonl"
    text = "one\u2028two\u2029three\x85four"
    file.write_text("\ufeff" + json.dumps({"prompt": text, "category": "[/bold]\x1b"}, ensure_ascii=False) + "\n")
    (prompt,) = load_prompts(file)
    assert (prompt.prompt, prompt.category) == (text, "[/bold]�")
