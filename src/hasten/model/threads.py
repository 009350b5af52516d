"""The threads that a forward pass computes on: no more than there are cores, and in the process that they belong to."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from hasten.errors import Notice, UserError

_home: int | None = None
"""The process that has loaded a model."""


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spare_cores() -> int:
    """Processors that this process may use beside those that a model computes on in this thread."""
    return max(0, cores() - torch.get_num_threads())


def settle() -> None:
    """To be called before a model is loaded: its threads will be this process's, and no more than it has cores.

    Threads beyond that wait for each other at every barrier, and thousands of them end the process.

    Raises:
        UserError: see `refuse_fork`.
    """
    global _home
    refuse_fork()
    if _home is None:
        _home = os.getpid()
    if torch.get_num_threads() > cores():
        warnings.warn(
            f"PyTorch is set to {torch.get_num_threads()} threads; hasten sets it to {cores()}, the cores that this "
            "process has",
            Notice,
            stacklevel=3,
        )
        torch.set_num_threads(cores())


def refuse_fork() -> None:
    """Threads do not survive a fork: the first step that needs them would wait for ever.

    Raises:
        UserError: a process forked from one that had loaded a model, and more than one thread.
    """
    if _home not in (None, os.getpid()) and torch.get_num_threads() > 1:
        raise UserError(
            "this process was forked from one that had loaded a model, whose threads it does not have: start it by "
            "'spawn', load models after the fork only, or compute on one thread (torch.set_num_threads(1))"
        )


def openmp_runtime() -> str | None:
    """The file of the OpenMP runtime that PyTorch has loaded, where it is GNU's (as in its builds for Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line}
    return next((file for file in files if "torch" in file), None)


@cache
def _openmp() -> ctypes.CDLL | None:
    file = openmp_runtime()
    return None if file is None else ctypes.CDLL(file)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Meanwhile, PyTorch has no team for the calling thread: each operation of one waits for all its cores to be free.

    Other threads keep theirs, which `torch.set_num_threads` would not leave them. Where the runtime is not GNU's, all
    stays as it is.
    """
    runtime = _openmp()
    if runtime is None:
        yield
        return
    count = runtime.omp_get_max_threads()
    runtime.omp_set_num_threads(1)
    try:
        yield
    finally:
        runtime.omp_set_num_threads(count)
