"""A conversation: what was said stays in the KV cache, so that only what is new is read."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from hasten.documents import dumps
from hasten.engine import Job, Progress, SamplingParams
from hasten.errors import UserError
from hasten.files import write_text
from hasten.llm import LLM

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

ROLES = ("system", "user", "assistant")


class Conversation:
    """Questions and answers with one model, by its chat template, one after the other.

    The engine recalls of a prompt what begins as an earlier text (`LLM(prefix_bytes=...)`), so prompts are made to
    begin with the very tokens of what was said: a template may not render an answer as the model spelt it.

    Args:
        llm: keeps finished texts; its drafters keep what they learn from one answer to the next.
        params: of every answer.
        method: specification, of the answers from now on.
        messages: what was said before; a system message comes first.

    Raises:
        UserError: no chat template, or one that refuses the messages; messages that end with a question.
    """

    def __init__(self, llm: LLM, params: SamplingParams, method: str, messages: Sequence[Message] = ()) -> None:
        if not llm.templated:
            raise UserError(f"{llm.folder} has no chat template, so it cannot chat: complete a text with it instead")
        if messages and messages[-1]["role"] == "user":
            raise UserError("the conversation ends with a question: it must end with an answer")
        self.llm, self.params, self.method = llm, params, method
        self.messages = [dict(message) for message in messages]
        self.request: Job | None = None
        """The latest answer's."""
        self._prompt: list[int] = []
        self._said: list[int] = []
        self._context = llm.model.config.max_positions
        # What the template refuses is told before anybody types.
        self._tokens([*self.messages, _user("?")])

    def reset(self) -> None:
        """Forget what was said, the system message aside."""
        self.messages = self.messages[: self._opening]
        self._said = []

    def ask(self, text: str) -> int:
        """Put a question, and drop the oldest turns where it leaves too little room for an answer.

        Returns:
            How many turns were dropped: enough for the next questions, too, since all that is left is read again.

        Raises:
            UserError: the question alone is longer than the context, or the template refuses it. It is not kept.
        """
        asked = [*self.messages, _user(text)]
        turns = [place for place, message in enumerate(asked) if message["role"] == "user"]

        def behind(dropped: int) -> list[Message]:
            return asked[: self._opening] + asked[turns[dropped] :] if dropped else asked

        dropped, prompt = 0, self._tokens(asked)
        room = min(self.params.max_tokens or self._context // 4, self._context // 2)
        if len(prompt) > self._context - room:
            spare = self._context // 2
            # Where the question alone is that long, it is asked alone.
            dropped = bisect_left(range(len(turns) - 1), -spare, key=lambda count: -len(self._tokens(behind(count))))
            prompt = self._tokens(behind(dropped))
        if len(prompt) >= self._context:
            raise UserError(f"the question takes {len(prompt)} tokens, but the context has {self._context}")
        self.messages, self._prompt = behind(dropped), prompt
        return dropped

    def answer(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Answer what was asked, step by step; `stopped` is asked before each, and what was said by then is kept.

        Of a question that gets no answer, nothing is kept.

        Raises:
            UserError: from the method or the engine.
        """
        engine = self.llm.engine
        self.request = None
        try:
            self.request = request = engine.add(self._prompt, self.params, self.method, read=True)[0]
            while request.finish_reason is None and not stopped():
                yield from engine.step()
                if request.error is not None:
                    raise request.error
        finally:
            if self.request is not None:
                engine.abort(self.request)
            self._keep(self.request)

    @property
    def text(self) -> str:
        """Of the latest answer, as it was said."""
        return "" if self.request is None else self.llm.text_of(self.request)

    def _keep(self, request: Job | None) -> None:
        """Take an answer into the conversation."""
        if request is None or not request.output:
            self.messages.pop()
            return
        text = self.text
        self._said = request.tokens
        # Some templates put a space before the answer that the model says itself.
        spellings = [[*self.messages, {"role": "assistant", "content": each}] for each in (text, text.strip())]
        self.messages = max(spellings, key=lambda messages: _common(self._tokens([*messages, _user("?")]), self._said))

    @property
    def _opening(self) -> int:
        """How many messages come before the first turn."""
        return len(list(takewhile(lambda message: message["role"] == "system", self.messages)))

    def _tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of messages, of which those that were said are as they were said."""
        tokens, said = self.llm.apply_chat_template(messages), self._said
        start = _common(tokens, said)
        wanted = self._spelt(said[start:])
        stop = start + bisect_left(
            range(len(tokens) - start), len(wanted), key=lambda count: len(self._spelt(tokens[start : start + count]))
        )
        return said + tokens[stop:] if self._spelt(tokens[start:stop]) == wanted else tokens

    def _spelt(self, tokens: list[int]) -> str:
        """Their text, special tokens included."""
        text: str = self.llm.tokenizer.decode(tokens, skip_special_tokens=False)
        return text


def save(messages: Sequence[Message], file: Path) -> None:
    """Write a conversation as JSON: the list of its messages.

    Raises:
        UserError: it cannot be written.
    """
    write_text(file, dumps(messages, indent=2, ensure_ascii=False) + "\n")


def load(file: Path) -> list[Message]:
    """A conversation that `save` wrote.

    Raises:
        UserError: it cannot be read, or is no list of messages.
    """
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read a conversation from {file}: {error}") from error
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError(f"{file} is no list of messages, each with a role ({', '.join(ROLES)}) and a content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many of the same tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
