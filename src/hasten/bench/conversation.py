"""What a model reads of a prompt: its text, or a conversation in which the model's own answers stand between turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hasten.bench.prompts import BenchPrompt
from hasten.engine import SamplingParams
from hasten.engine.text import decode
from hasten.errors import UserError
from hasten.llm import LLM


class Reader:
    """Prompts as the token ids that one method reads: a later turn of a conversation holds what *it* answered before.

    What it has not answered itself, plain decoding answers. A checkpoint with a chat template gets a conversation
    through it, another one the texts with empty lines between.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.llm, self.params = llm, params
        self.answers: dict[tuple[str, ...], str] = {}

    def ids(self, prompt: BenchPrompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            UserError: an earlier turn outgrows the context; the template refuses the conversation.
        """
        if prompt.turns:
            return self._conversation(prompt)
        if prompt.question is not None and self.llm.templated:
            return self.llm.apply_chat_template(prompt.question.messages)
        return self.llm.encode(prompt.prompt)

    def answered(self, prompt: BenchPrompt, tokens: Sequence[int]) -> None:
        """Keep what was answered, for the turns to come."""
        if prompt.turns:
            self.answers[prompt.turns] = decode(self.llm.tokenizer, tokens).strip()

    def _conversation(self, prompt: BenchPrompt) -> list[int]:
        texts = [prompt.turns[0]]
        for place, turn in enumerate(prompt.turns[1:], 1):
            texts += [self._answer(prompt, place), turn]
        if not self.llm.templated:
            return self.llm.encode("\n\n".join(texts))
        roles = ("user", "assistant")
        return self.llm.apply_chat_template([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])

    def _answer(self, prompt: BenchPrompt, count: int) -> str:
        """What was answered to the first turns of a conversation."""
        earlier = replace(prompt, turns=prompt.turns[:count])
        if earlier.turns not in self.answers:
            budget = prompt.within(self.params)
            self.answered(earlier, self.llm.generate([self.ids(earlier)], budget, "plain")[0].token_ids)
        return self.answers[earlier.turns]


def encode(llm: LLM, prompts: Sequence[BenchPrompt], params: SamplingParams) -> list[list[int]]:
    """Token ids of each prompt; plain decoding answers the earlier turns of conversations.

    Raises:
        UserError: a conversation that outgrows the context; the template refuses it.
    """
    reader = Reader(llm, params)
    return [reader.ids(prompt) for prompt in prompts]


def as_chat(llm: LLM, prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """Each prompt as what a user says; questions that bring messages of their own, and conversations, are that already.

    Raises:
        UserError: the checkpoint has no chat template.
    """
    if not llm.templated:
        raise UserError(f"{llm.folder} has no chat template: leave --chat out")
    return [
        prompt if prompt.turns or prompt.question is not None else replace(prompt, turns=(prompt.prompt,))
        for prompt in prompts
    ]
