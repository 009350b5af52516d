"""An answer in the making, whatever API it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hasten.engine import Job
from hasten.engine.request import Progress
from hasten.llm import LLM
from hasten.serve.errors import ApiError

Groups = Sequence[Sequence[Job]]
"""Of each prompt its choices."""


class Event(NamedTuple):
    """Of a stream; without a document, it says that there are no more."""

    document: dict[str, Any] | None
    name: str | None = None


class Answer(ABC):
    """Makes what a client reads of what the engine does."""

    @abstractmethod
    def whole(self, groups: Groups) -> dict[str, Any]:
        """The answer at its end."""

    @abstractmethod
    def opened(self, groups: Groups) -> list[Event]:
        """The first events of a stream, before any token."""

    @abstractmethod
    def news(self, groups: Groups, number: int, step: Progress) -> list[Event]:
        """What a step gave a choice of prompt `number`."""

    @abstractmethod
    def closed(self, groups: Groups) -> list[Event]:
        """The last events."""

    def failed(self, error: ApiError) -> list[Event]:
        """The last events of a stream that went wrong."""
        return [Event(error.document), Event(None)]

    def counted(self, groups: Groups) -> dict[str, Any]:
        """Tokens, in OpenAI's words."""
        return usage(groups)


def token_text(llm: LLM, token: int) -> str:
    """A token by itself, special ones, too."""
    return str(llm.tokenizer.decode([token]))


def numbered(groups: Groups) -> Iterator[tuple[int, Job]]:
    """All choices, and their numbers for clients: those of the first prompt come first."""
    for number, group in enumerate(groups):
        for job in group:
            yield number * len(group) + job.choice, job


def usage(groups: Groups, empty: bool = False) -> dict[str, Any]:
    """Tokens; a prompt counts once for all its choices."""
    prompt = sum(group[0].prompt_length for group in groups)
    output = 0 if empty else sum(len(job.output) for group in groups for job in group)
    cached = sum(group[0].statistics.recalled_rows for group in groups)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def figures(groups: Groups) -> dict[str, Any]:
    """What clients of other servers leave alone: the method, and what it gave."""
    jobs = [job for group in groups for job in group]
    steps, tokens = sum(job.statistics.steps for job in jobs), sum(job.statistics.tokens for job in jobs)
    return {
        "method": jobs[0].method,
        "steps": steps,
        "tokens_per_step": round(tokens / steps, 4) if steps else 0.0,
        "proposed": sum(job.statistics.proposed for job in jobs),
        "accepted": sum(job.statistics.accepted for job in jobs),
    }
