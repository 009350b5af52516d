"""`hasten chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.chat_answers import Line, Screen
from hasten.cli.chat_messages import BLOCK, lines, stopping, typed
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.conversation import Conversation


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
        Session(conversation, Line() if json else Screen(), False).run(lines())
        return
    screen = Screen()
    screen.note(f"{model} with {method}: /help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    Session(conversation, screen, True).run(typed())


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

    def __init__(self, conversation: Conversation, output: Screen | Line, interactive: bool) -> None:
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
        with stopping(self.interactive) as stopped:
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
