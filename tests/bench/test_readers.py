"""Conversations: whose answers stand in them, and what becomes of a prompt that is what a user says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten import LLM, SamplingParams, UserError
from hasten.bench.conversation import Reader, as_chat, encode
from hasten.bench.parallelbench import parallelbench
from hasten.bench.prompts import BenchPrompt

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def conversation(*turns: str) -> list[BenchPrompt]:
    return [BenchPrompt("talk", "talk", turn, None, turns[: place + 1]) for place, turn in enumerate(turns)]


def said(llm: LLM, *texts: str) -> list[int]:
    """What is read of a conversation that the user begins."""
    roles = ("user", "assistant")
    return llm.apply_chat_template([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])


def test_answers_between_turns_are_plain_decodings_own(llm: LLM):
    asked = ["the cat", "and the moon", "sing"]
    got = encode(llm, [*conversation(*asked), BenchPrompt("", "", "the stars", None)], PARAMS)
    texts: list[str] = []
    for turn, ids in zip(asked, got, strict=False):
        texts.append(turn)
        assert ids == said(llm, *texts)
        texts.append(llm.generate(ids, PARAMS)[0].text.strip())
    assert len(got) == 4 and got[3] == llm.encode("the stars")
    assert got[2][: len(got[0])] == got[0]


def test_a_reader_goes_on_with_what_it_was_told(llm: LLM):
    """Whatever the tokens of a method were, its next turn has them, and not plain decoding's."""
    first, second, third = conversation("the cat", "sing", "again")
    reader = Reader(llm, PARAMS)
    reader.answered(first, llm.encode(" stars and water </s>"))
    assert reader.ids(second) == said(llm, "the cat", "stars and water", "sing")
    reader.answered(second, llm.encode("la"))
    assert reader.ids(third) == said(llm, "the cat", "stars and water", "sing", "la", "again")
    # A question that begins alike has an answer of its own.
    reader.answered(first, llm.encode("moon"))
    assert reader.ids(second) == said(llm, "the cat", "moon", "sing")


def test_without_a_chat_template_texts_are_joined(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    first, second = encode(llm, conversation("the cat", "sing"), PARAMS)
    answer = llm.generate([first], PARAMS)[0].text.strip()
    assert first == llm.encode("the cat")
    assert second == llm.encode(f"the cat\n\n{answer}\n\nsing")
    with pytest.raises(UserError, match="has no chat template: leave --chat out"):
        as_chat(llm, conversation("the cat"))


def test_a_prompt_as_what_a_user_says(llm: LLM):
    alone = BenchPrompt("words", "words", "the cat", None)
    asked = [alone, *conversation("the cat", "sing"), parallelbench("parallelbench", 1)[0]]
    chats = as_chat(llm, asked)
    assert chats[0] == replace(alone, turns=("the cat",)) and chats[1:] == asked[1:]
    assert encode(llm, chats[:1], PARAMS) == [said(llm, "the cat")] != encode(llm, [alone], PARAMS)
