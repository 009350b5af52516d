"""Standard streams that are closed, full or without UTF-8, and text that is none: a sentence each, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten import UserError
from hasten.cli import streams

SOURCE = Path(streams.__file__).parents[2]
GENERATE = "{hasten} generate 'the cat' --max-tokens 2"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command line as a shell runs it; `{hasten}` is the program."""
    known = {**os.environ, "PYTHONPATH": str(SOURCE), **environment}
    program = f"{sys.executable} -m hasten"
    return subprocess.run(["bash", "-c", command.format(hasten=program)], capture_output=True, env=known, timeout=300)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (f"{GENERATE} >/dev/full", "cannot write to standard output: No space left on device"),
        (f"{GENERATE} --json >/dev/full", "cannot write to standard output: No space left on device"),
        ("{hasten} methods >/dev/full", "cannot write to standard output: No space left on device"),
        ("{hasten} >/dev/full", "cannot write to standard output: No space left on device"),
        ("{hasten} --help >/dev/full", "cannot write to standard output: No space left on device"),
        ("{hasten} generate --help >/dev/full", "cannot write to standard output: No space left on device"),
        ("{hasten} --version >/dev/full", "cannot write to standard output: No space left on device"),
        (f"{GENERATE} >&-", "cannot write to standard output: it is closed"),
        ("{hasten} generate - <&-", "cannot read standard input: it is closed"),
        ("{hasten} race - <&-", "cannot read standard input: it is closed"),
        (r"printf 'a\xff' | {hasten} generate -", "standard input is no UTF-8 text: byte 2 is none"),
        (r"{hasten} generate $'caf\xe9'", "the prompt is no UTF-8 text: byte 4 is none"),
        (r"{hasten} generate hi --max-tokens 1 --stop $'\xe9'", "a stop string is no UTF-8 text: byte 1 is none"),
    ],
)
def test_refused(command, sentence):
    ran = shell(command)
    assert (ran.returncode, ran.stderr.decode()) == (2, f"hasten: {sentence}\n")


def test_who_reads_no_more_has_enough():
    ran = shell("{hasten} methods | true; exit ${{PIPESTATUS[0]}}")
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_closed_stderr_takes_its_sentences_along():
    ran = shell("{hasten} generate '' 2>&-")
    assert (ran.returncode, ran.stdout) == (2, b"")


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["locale", "terminal"],
)
def test_utf8_without_a_locale(environment):
    prompt = "Copy: café €"
    ran = shell(f"{{hasten}} generate '{prompt}' --max-tokens 2 --json", **environment)
    document = json.loads(ran.stdout.decode("ascii"))
    plain = json.loads(shell(f"{{hasten}} generate '{prompt}' --max-tokens 2 --json").stdout)
    assert document["token_ids"] == plain["token_ids"]
    assert document["text"] == plain["text"]
    assert shell("{hasten} methods", **environment).returncode == 0


@given(st.binary(max_size=12).filter(lambda raw: 0 not in raw))
def test_any_argument_is_text_or_refused(raw):
    try:
        assert streams.argument("the prompt", os.fsdecode(raw)).encode() == raw
    except UserError as error:
        assert "no UTF-8" in str(error)
        with pytest.raises(UnicodeDecodeError):
            raw.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="signals that can be held")
def test_a_document_is_written_whole():
    """A signal that comes in the middle of it waits."""
    code = """
import os, signal, sys
from hasten.cli import options
class Slow:
    encoding = "utf-8"
    def write(self, text):
        os.kill(os.getpid(), signal.SIGINT)
        return sys.__stdout__.write(text)
    def flush(self):
        sys.__stdout__.flush()
sys.stdout = Slow()
try:
    options.emit({"a": list(range(9))})
except KeyboardInterrupt:
    sys.exit(130)
"""
    known = {**os.environ, "PYTHONPATH": str(SOURCE)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=known, timeout=300)
    assert ran.returncode == 130
    assert json.loads(ran.stdout) == {"a": list(range(9))}


def test_nothing_is_held_in_other_threads():
    done = []

    def hold() -> None:
        with streams.uninterrupted():
            done.append(True)

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert done == [True]
