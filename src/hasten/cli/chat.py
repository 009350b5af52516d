"""`hasten chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.colours import Coloured
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.documents import dumps
from hasten.errors import Interrupted, UserError

if TYPE_CHECKING:
    from hasten.conversation import Conversation

BLOCK = '"""'
"""What stands around a message of several lines."""


@dataclass(frozen=True)
class ForChat(ForDecoding):
    """How a model is loaded that chats: what was said may stay in its KV cache."""

    prefix_bytes: Annotated[
        str, typer.Option("--prefix-bytes", help="What the conversation may keep of the KV cache, such as 2GiB.")
    ] = "8GiB"


@grouped
def chat(
    model: options.Model = "tiny",
    method: options.Chosen = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with the conversation that /save wrote here.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the checkpoint's).")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the answers, whichever lossless method.")] = None,
    loading: ForChat = ForChat(),
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per answer, and nothing else.")] = False,
) -> None:
    """Talk with a model; /help lists what can be typed besides messages.

    Green tokens came from accepted drafts, yellow ones are the model's own at the end of a draft. What was said stays
    in the KV cache: only what is new is read. Without a terminal, each line of standard input is a message.
    """
    messages = _opening(system, load)
    llm = loading.load(model)

    from hasten.bench.race import default_method
    from hasten.conversation import Conversation

    method = default_method(llm.model.config) if method is None else method
    llm.engine.drafter(method)
    given: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = replace(llm.default_params, **{name: value for name, value in given.items() if value is not None})
    conversation = Conversation(llm, params, method, messages)
    if json or sys.stdin is None or not sys.stdin.isatty():
        Session(conversation, _Line() if json else _Screen(), False).run(_lines())
        return
    screen = _Screen()
    screen.note(f"{model} with {method}: /help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    Session(conversation, screen, True).run(_typed())


def _opening(system: str | None, load: Path | None) -> list[dict[str, str]]:
    """What was said before anybody types; a system message takes the place of the one in the file."""
    messages: list[dict[str, str]] = []
    if load is not None:
        from hasten.conversation import load as read

        messages = read(load)
    if system is None:
        return messages
    said = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system}, *said]


class Session:
    """Messages and commands, one after the other.

    Args:
        output: shows answers and what is to be noted.
        interactive: somebody sits there: what is wrong is told, and the conversation goes on.
    """

    def __init__(self, conversation: Conversation, output: _Screen | _Line, interactive: bool) -> None:
        self.conversation, self.output, self.interactive = conversation, output, interactive

    def run(self, messages: Iterator[str]) -> None:
        """Until there are no more messages, or one says so.

        Raises:
            UserError: something is wrong, and nobody sits there to mend it.
        """
        for message in messages:
            try:
                if message.startswith("/") and not message.startswith("//"):
                    if not self._command(*message.partition(" ")[::2]):
                        return
                elif message.strip():
                    self._answer(message.removeprefix("/"))
            except UserError as error:
                if not self.interactive:
                    raise
                self.output.note(str(error))

    def _answer(self, message: str) -> None:
        conversation = self.conversation
        dropped = conversation.ask(message)
        if dropped:
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            self.output.note(f"{turns} dropped: the context is full")
        with _stopping(self.interactive) as stopped:
            self.output.answer(conversation, stopped, dropped)

    def _command(self, name: str, argument: str) -> bool:
        """Do what a command says; whether the conversation goes on."""
        argument = argument.strip()
        if name == "/exit":
            return False
        if name == "/help":
            self.output.note(HELP)
        elif name == "/reset":
            self.conversation.reset()
        elif name == "/method" and argument:
            self.conversation.llm.engine.drafter(argument)
            self.conversation.method = argument
        elif name == "/method":
            self.output.note(self.conversation.method)
        elif name == "/save" and argument:
            from hasten.conversation import save

            save(self.conversation.messages, Path(argument).expanduser())
        else:
            known = "/method SPEC, /save FILE, /reset, /help and /exit"
            raise UserError(f"{name} {argument}".rstrip() + f" is no command: there are {known}")
        return True


HELP = f"""\
/method SPEC  answer by this method from now on (see `hasten methods`); without one, say which it is
/save FILE    write the conversation as JSON; `hasten chat --load FILE` goes on with it
/reset        forget what was said, the system message aside
/exit         end, as Ctrl-D does
A message of several lines: end a line with \\, or put {BLOCK} before and behind. One that begins with / is said by //.
Ctrl-C stops the answer and keeps what was said. Green tokens came from drafts, yellow ones stand at a draft's end."""


class _Screen:
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


class _Line:
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


@contextmanager
def _stopping(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Where somebody sits there, Ctrl-C asks the answer inside to stop after its step, and the second one stops it now.

    Yields:
        Whether it was asked.
    """
    if not interactive or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        signal.signal(signal.SIGINT, before)
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    except Interrupted:
        raise
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """Messages of who does not sit at a terminal."""
    try:
        for line in sys.stdin or ():
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no text in UTF-8: {error}") from error


def _typed() -> Iterator[str]:
    """Messages that are typed, with the line editing and the history of the terminal."""
    import readline  # noqa: F401  # `input` uses it once it is there

    while True:
        try:
            with _heard():
                message = _message()
            yield message
        except EOFError:
            print()
            return
        except Interrupted:
            raise
        except KeyboardInterrupt:
            # What was typed is not meant.
            print()


@contextmanager
def _heard() -> Iterator[None]:
    """Signals that come between the prompt and the wait for a key are answered within half a second.

    The line editor looks for them before it prints the prompt, and then not until something interrupts its wait.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _message() -> str:
    """One message: a line, with those behind a backslash, or a block."""
    message = input(">>> ")
    if message.startswith(BLOCK):
        message = message.removeprefix(BLOCK)
        while not message.endswith(BLOCK):
            message += "\n" + input("... ")
        return message.removesuffix(BLOCK)
    while message.endswith("\\"):
        message = message[:-1] + "\n" + input("... ")
    return message
