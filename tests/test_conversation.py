"""Conversations: only what is new is read, whatever the template and however an answer ended."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from math import inf
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.conversation import Conversation, load, save
from hasten.errors import UserError
from helpers import save_checkpoint

LONG = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(save_checkpoint(tmp_path_factory.mktemp("models")), prefix_bytes="64MiB")


@pytest.fixture
def talk(llm: LLM) -> Callable[..., Conversation]:
    while llm.engine.prefixes.evict():
        pass
    return lambda params=LONG, method="ngram", messages=(): Conversation(llm, params, method, messages)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def say(conversation: Conversation, text: str, steps: int | None = None) -> str:
    """The answer, stopped after so many steps."""
    asked = count()
    conversation.ask(text)
    for _ in conversation.answer(lambda: steps is not None and next(asked) == steps):
        pass
    return conversation.text


@pytest.mark.parametrize("method", ["plain", "ngram", "suffix", "copyspec"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [None, 5])
def test_all_but_the_last_token_of_what_was_said_is_recalled(
    talk, llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str, temperature: float, steps: int | None
):
    """Random weights spell as no tokenizer would: what the template gives is other tokens."""
    monkeypatch.setattr(llm.tokenizer, "chat_template", TEMPLATE)
    # A text has neither special tokens nor halves of characters.
    unspeakable = [
        token for token in range(len(llm.tokenizer)) if llm.tokenizer.decode([token]) in ("<s>", "</s>", "\ufffd")
    ]
    bias = dict.fromkeys(unspeakable, -inf)
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=1, logit_bias=bias)
    conversation = talk(params, method)
    said = 0
    for turn in range(4):
        say(conversation, f"the cat {turn}", steps)
        request = conversation.request
        assert request is not None
        assert request.statistics.recalled_rows == max(0, said - 1)
        assert request.statistics.prompt_rows == request.prompt_length - request.statistics.recalled_rows
        said = len(request.tokens)
    if steps is None:
        assert llm.apply_chat_template(conversation.messages)[:said] != request.tokens


def test_an_answer_is_the_one_without_a_cache(talk, llm: LLM):
    conversation = talk()
    for turn in range(3):
        say(conversation, f"moon {turn}")
    request = conversation.request
    fresh = LLM(llm.folder).generate([request.tokens[: request.prompt_length]], LONG)[0]
    assert fresh.token_ids == request.output


def test_the_messages_are_what_was_said(talk, llm: LLM):
    conversation = talk(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    answer = say(conversation, "c")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[-1]["content"] in (answer, answer.strip())
    conversation.reset()
    assert conversation.messages == []


def test_the_oldest_turns_go_and_a_system_message_stays(talk, monkeypatch: pytest.MonkeyPatch, llm: LLM):
    monkeypatch.setattr(
        llm.tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    conversation = talk(messages=[{"role": "system", "content": "brief"}])
    dropped = []
    for turn in range(12):
        dropped.append(conversation.ask(f"question {turn}"))
        for _ in conversation.answer():
            pass
        assert conversation.request.finish_reason == "length" and len(conversation.request.output) == 24
    assert sum(dropped) > 3 and dropped[0] == 0
    # Several at a time: all that is left is read again.
    assert max(dropped) > 1
    assert conversation.messages[0] == {"role": "system", "content": "brief"}
    assert conversation.messages[1]["role"] == "user"


def test_a_question_longer_than_the_context_is_refused_and_all_stays(talk):
    conversation = talk()
    say(conversation, "the cat")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"the question takes \d+ tokens, but the context has 256"):
        conversation.ask("the moon " * 300)
    assert conversation.messages == before
    say(conversation, "the cat")
    assert len(conversation.messages) == 4


def test_a_question_without_an_answer_is_not_kept(talk):
    conversation = talk()
    assert say(conversation, "the cat", steps=0) == ""
    assert conversation.messages == []
    conversation.method = "nonsense"
    conversation.ask("the cat")
    with pytest.raises(UserError, match="unknown method"):
        list(conversation.answer())
    assert conversation.messages == [] and conversation.text == ""


def test_what_the_template_refuses_is_told_at_once(talk):
    with pytest.raises(UserError, match="no such role"):
        talk(messages=[{"role": "system", "content": "brief"}])


def test_saved_and_loaded(tmp_path: Path):
    messages = [{"role": "user", "content": "caf\u00e9\n"}, {"role": "assistant", "content": "\u2028"}]
    save(messages, tmp_path / "said.json")
    assert load(tmp_path / "said.json") == messages
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "other.json"))):
        load(tmp_path / "other.json")
