"""How `hasten chat` shows answers: as coloured text on a screen, or as lines of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hasten.cli.colours import Coloured
from hasten.documents import dumps

if TYPE_CHECKING:
    from hasten.conversation import Conversation


class Screen:
    """Answers as coloured text on stdout as they come; notes, and a line of figures per answer, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self._answers, self._notes = Console(highlight=False, soft_wrap=True), Console(stderr=True, soft_wrap=True)

    def note(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False, highlight=False)

    def answer(self, conversation: Conversation, stopped: Callable[[], bool], dropped: int) -> None:
        coloured = Coloured(conversation.llm.tokenizer)
        waiting: list[tuple[str, str]] = []
        try:
            for progress in conversation.answer(stopped):
                waiting += coloured.push(progress.tokens, progress.kinds)
                if progress.finish_reason is not None:
                    waiting += coloured.flush()
                # Less than that where a stop string may have begun.
                waiting = self._print(waiting, len(progress.text))
        finally:
            self._answers.print()
        if self._notes.is_terminal:
            figures = figures_of(conversation, dropped)
            self.note(
                f"{figures['tokens']} tokens, {figures['tokens_per_second']:.0f}/s, "
                f"{figures['tokens_per_step']:.2f} per step, {figures['finish_reason']}; "
                f"read {figures['prompt_rows']} of {figures['prompt_tokens']} tokens of the conversation"
            )

    def _print(self, pieces: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
        """Print so many characters, and return the rest."""
        from rich.text import Text

        shown = Text()
        while pieces and count > 0:
            text, colour = pieces[0]
            shown.append(text[:count], style=colour)
            pieces = [(text[count:], colour), *pieces[1:]] if len(text) > count else pieces[1:]
            count -= len(text)
        self._answers.print(shown, end="")
        return pieces


class Line:
    """Answers as lines of JSON on stdout, notes on stderr."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def answer(self, conversation: Conversation, stopped: Callable[[], bool], dropped: int) -> None:
        for _ in conversation.answer(stopped):
            pass
        print(dumps({"text": conversation.text} | figures_of(conversation, dropped), ensure_ascii=False), flush=True)


def figures_of(conversation: Conversation, dropped: int) -> dict[str, Any]:
    """What the latest answer took; of its prompt, `recalled_rows` were in the cache, and `prompt_rows` were read."""
    request = conversation.request
    assert request is not None
    statistics = request.statistics
    return {
        "tokens": len(request.output),
        "finish_reason": request.finish_reason,
        "method": request.method,
        "seconds": round(request.seconds, 6),
        "tokens_per_second": round(len(request.output) / request.seconds, 2),
        "tokens_per_step": round(statistics.tokens_per_step, 4),
        "prompt_tokens": request.prompt_length,
        "recalled_rows": statistics.recalled_rows,
        "prompt_rows": statistics.prompt_rows,
        "dropped_turns": dropped,
    }
