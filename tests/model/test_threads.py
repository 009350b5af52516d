"""Threads that cannot be: more than there are cores, and those of the process that this one was forked from."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hasten import LLM, UserError
from hasten.cli import options
from hasten.errors import Notice
from hasten.model import load_model, threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """As many as said meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


FORKED = """
import os, sys
import torch
from hasten import LLM, SamplingParams, UserError

torch.set_num_threads(int(sys.argv[2]))
short, model = SamplingParams(max_tokens=3), sys.argv[1]
llm = LLM(model)
expected = llm.generate("the cat", short)[0].token_ids

def used():
    return llm.generate("the cat", short)[0].token_ids

def loaded():
    return LLM(model).generate("the cat", short)[0].token_ids

for attempt in (used, loaded):
    if (child := os.fork()) == 0:
        try:
            said = "the same" if attempt() == expected else "another"
        except UserError as error:
            said = str(error)
        print(attempt.__name__, said, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print("parent", used() == expected)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_process(tiny: Path, count: int) -> None:
    """Without threads it has all it needs; with them it would wait for ever."""
    if count > threads.cores():
        pytest.skip("one core")
    ran = subprocess.run(
        [sys.executable, "-c", FORKED, str(tiny), str(count)], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    used, loaded, parent = ran.stdout.splitlines()
    assert parent == "parent True"
    for name, line in (("used", used), ("loaded", loaded)):
        said = "the same" if count == 1 else "this process was forked from one that had loaded a model"
        assert line.startswith(f"{name} {said}")


def test_more_threads_than_cores(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "cores", lambda: 1)
    try:
        with pytest.warns(Notice, match="PyTorch is set to 2 threads; hasten sets it to 1"):
            load_model(tiny)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(known)


@pytest.mark.parametrize("count", [-1, 100_000, threads.cores() + 1])
def test_threads_of_a_command(count: int) -> None:
    known = torch.get_num_threads()
    with pytest.raises(UserError, match=rf"threads must be between 0 \(all cores\) and {threads.cores()}, .* {count}$"):
        options.set_threads(count)
    options.set_threads(0)
    assert torch.get_num_threads() == known


@pytest.mark.parametrize("name", ["avx9", "Portable", "amx "])
def test_unknown_instruction_sets(tiny: Path, name: str) -> None:
    command = [sys.executable, "-m", "hasten", "generate", "the cat", "--model", str(tiny)]
    ran = subprocess.run(command, env=os.environ | {"HASTEN_NATIVE": name}, capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"hasten: HASTEN_NATIVE is {name!r}, which is none of portable, avx2, ")


def test_no_instruction_set_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from instruction_sets import chosen

    from hasten.model.native import library

    best = library.kernels()
    if best is None:
        pytest.skip("the native step was not built: no C++ compiler")
    with chosen("", library.LIBRARY, Path(os.environ["HASTEN_CACHE"])) as available:
        assert available
        assert library.kernels() == best
        assert LLM(tiny).model.backend.name == "native"


@pytest.mark.skipif(threads.openmp_runtime() is None, reason="PyTorch has another runtime")
def test_one_thread_for_the_calling_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    with torch_threads(3):
        with pytest.raises(KeyError), threads.on_one_thread():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            raise KeyError
        assert torch.get_num_threads() == 3
        assert seen == [3]
        monkeypatch.setattr(threads, "_openmp", lambda: None)
        with threads.on_one_thread():
            assert torch.get_num_threads() == 3
