"""`hasten chat`, without a terminal and at one."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import pytest

from hasten.model.checkpoint import resolve

QUESTIONS = ("Copy the list: red cat moon tin salt", "Reverse the list: red cat moon tin salt")


@pytest.fixture
def chat(hasten, monkeypatch: pytest.MonkeyPatch):
    """chat("a", "b", options=[...]): each text is a line of standard input."""

    def run(*lines: str, options: tuple[str, ...] = ("--json",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return hasten("chat", *options)

    return run


def answers(ran) -> list[dict]:
    assert ran.status == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def test_a_line_of_json_per_answer_and_only_new_rows_are_read(chat):
    first, second = answers(chat(*QUESTIONS))
    assert first["text"].split() == ["red", "cat", "moon", "tin", "salt"]
    assert first["recalled_rows"] == 0 and first["prompt_rows"] == first["prompt_tokens"]
    # All but the last token of what was said, which nobody had to read so far.
    assert second["recalled_rows"] == first["prompt_tokens"] + first["tokens"] - 1
    assert second["prompt_rows"] == second["prompt_tokens"] - second["recalled_rows"]


def test_plain_text_has_no_prompts_or_figures(chat):
    ran = chat(QUESTIONS[0], "", options=())
    assert (ran.out, ran.err) == (" red cat moon tin salt\n", "")


def test_saved_and_loaded_it_goes_on(chat, tmp_path: Path):
    file = tmp_path / "said.json"
    whole = answers(chat(*QUESTIONS))
    answers(chat(QUESTIONS[0], f"/save {file}"))
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]
    (second,) = answers(chat(QUESTIONS[1], options=("--json", "--load", str(file))))
    assert (second["text"], second["prompt_tokens"]) == (whole[1]["text"], whole[1]["prompt_tokens"])


def test_commands(chat):
    ran = chat(QUESTIONS[0], "/method plain", "/method", "/reset", QUESTIONS[0], "//hm", "/exit", QUESTIONS[1])
    first, second, third = answers(ran)
    assert (first["method"], second["method"]) == ("ngram", "plain")
    assert second["prompt_tokens"] == first["prompt_tokens"] < third["prompt_tokens"]
    assert ran.err == "plain\n"


def test_a_system_message_takes_the_place_of_the_one_that_was_saved(chat, tmp_path: Path):
    file = tmp_path / "said.json"
    answers(chat(QUESTIONS[0], "/reset", f"/save {file}", options=("--json", "--system", "Be brief.")))
    assert json.loads(file.read_text()) == [{"role": "system", "content": "Be brief."}]
    answers(chat(f"/save {file}", options=("--json", "--system", "Be long.", "--load", str(file))))
    assert json.loads(file.read_text()) == [{"role": "system", "content": "Be long."}]


def test_the_oldest_turns_are_dropped(chat):
    ran = chat(*["Copy the list: " + "red cat " * 60] * 9, options=("--json", "--max-tokens", "200"))
    dropped = [answer["dropped_turns"] for answer in answers(ran)]
    assert dropped[0] == 0 and max(dropped) >= 2
    assert re.fullmatch(r"(the \d oldest turns were dropped: the context is full\n)+", ran.err)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["/mehtod ngram"], "/mehtod ngram is no command: there are /method SPEC, /save FILE, /reset, /help and /exit"),
        (["/save"], "/save is no command: there are /method SPEC, /save FILE, /reset, /help and /exit"),
        (["/save /nowhere/at/all"], "cannot write /nowhere/at/all: No such file or directory"),
        (["/method nonsense"], "unknown method 'nonsense'"),
        (["red cat " * 600], "the question takes"),
    ],
)
def test_what_is_wrong_is_told(chat, lines: list[str], sentence: str):
    ran = chat(*lines)
    assert ran.status == 2 and ran.err.startswith(f"hasten: {sentence}") and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '[{"role": "robot", "content": ""}]', '[{"role": "user"}]', '[{"role": "user", "content": "a"}]'],
)
def test_a_file_that_is_no_conversation(chat, tmp_path: Path, content: str):
    file = tmp_path / "said.json"
    file.write_text(content)
    ran = chat(options=("--load", str(file)))
    assert ran.status == 2 and ran.err.count("\n") == 1


def test_without_a_chat_template(chat, tmp_path: Path):
    folder = tmp_path / "silent"
    copytree(resolve("tiny"), folder)
    (folder / "chat_template.jinja").unlink()
    ran = chat("Hello", options=("--model", str(folder)))
    sentence = f"hasten: {folder} has no chat template, so it cannot chat: complete a text with it instead\n"
    assert (ran.status, ran.err) == (2, sentence)


def test_standard_input_that_is_no_text(hasten, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    ran = hasten("chat")
    assert ran.status == 2 and "no text in UTF-8" in ran.err


class Terminal:
    """The program at a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.screen, ours = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
        environment.pop("NO_COLOR", None)
        self.program = subprocess.Popen(
            [sys.executable, "-m", "hasten", "chat", *options],
            stdin=ours, stdout=ours, stderr=ours, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # for Ctrl-C
        )  # fmt: skip
        os.close(ours)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def until(self, wanted: str, seconds: float = 60) -> str:
        """What was shown up to there, since the last time."""
        deadline = time.monotonic() + seconds
        while wanted not in self.shown:
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.shown
            try:
                self.shown += os.read(self.screen, 4096).decode()
            except OSError:
                self.shown += "\x00"
        shown, _, self.shown = self.shown.partition(wanted)
        return shown


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*options: str) -> Terminal:
        opened.append(Terminal(*options))
        return opened[-1]

    yield start
    for each in opened:
        each.program.kill()
        each.program.wait()
        os.close(each.screen)


def test_at_a_terminal(terminal, tmp_path: Path):
    program, file = terminal("--max-tokens", "900"), tmp_path / "said.json"
    program.until(">>> ")
    program.type("nonsense that is not meant")
    program.until("meant")
    # Readline does not see a signal that comes just before it waits for keys.
    time.sleep(0.5)
    program.type("\x03")
    program.until(">>> ")
    program.type("Copy the list: red cat moon tin salt\r")
    shown = program.until("tokens of the conversation")
    # Green: from drafts.
    assert "\x1b[32m" in shown
    assert re.search(r"\d+ tokens, \d+/s, \d\.\d\d per step, stop; read 1\d of 1\d", shown)
    program.until(">>> ")
    program.type('"""Copy the list:\rred cat"""\r')
    program.until("per step, stop")
    program.until(">>> ")
    program.type("Copy the list: \\\rred cat\r")
    program.until("per step, stop")
    program.until(">>> ")
    program.type("/hm\r")
    program.until("/hm is no command")
    program.until(">>> ")
    program.type(f"/save {file}\r")
    program.until(">>> ")
    program.type("\x04")
    assert program.program.wait(10) == 0
    assert [message["content"] for message in json.loads(file.read_text())[::2]] == [
        "Copy the list: red cat moon tin salt",
        "Copy the list:\nred cat",
        "Copy the list: \nred cat",
    ]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(terminal, tmp_path: Path):
    """A temperature that keeps it talking."""
    program, file = terminal("--temperature", "60", "--seed", "3", "--method", "plain"), tmp_path / "said.json"
    program.until(">>> ")
    program.type("Tell me a story\r")
    program.until("\r\n")
    time.sleep(0.3)
    program.type("\x03")
    assert "per step, abort" in program.until("of the conversation")
    program.until(">>> ")
    program.type(f"/save {file}\r")
    program.until(">>> ")
    os.kill(program.program.pid, signal.SIGTERM)
    assert program.program.wait(10) == 143
    said = json.loads(file.read_text())
    assert [message["role"] for message in said] == ["user", "assistant"] and said[1]["content"]
