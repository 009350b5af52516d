"""Loads the native library and keeps teams of threads."""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from itertools import takewhile
from pathlib import Path

import torch

from hasten.errors import UserError
from hasten.model.native.structs import STRUCTS
from hasten.model.threads import openmp_runtime

LIBRARY = Path(__file__).with_name("_step.so")
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx", "neon", "neondot", "neonbf16")
"""The names that `HASTEN_NATIVE` may have; without it the last of them that the processor has is chosen."""


_loading = threading.Lock()


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was not built or cannot be loaded.

    Raises:
        UserError: it was built from another version's sources, or `HASTEN_NATIVE` asks for an instruction set that
            there is not.
    """
    with _loading:
        return _load()


def _load() -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    require_sizes(LIBRARY, loaded, "hasten_sizes", [*map(ctypes.sizeof, STRUCTS)])
    loaded.hasten_kernels.restype, loaded.hasten_kernels.argtypes = c_char_p, []
    loaded.hasten_borrow.restype, loaded.hasten_borrow.argtypes = c_int, [c_char_p]
    loaded.hasten_team.restype, loaded.hasten_team.argtypes = c_void_p, [c_int]
    loaded.hasten_disband.restype, loaded.hasten_disband.argtypes = None, [c_void_p]
    loaded.hasten_forward.restype = c_int64
    loaded.hasten_forward.argtypes = [c_void_p, c_void_p, c_void_p, c_int64]
    loaded.hasten_chain.restype = c_int64
    loaded.hasten_chain.argtypes = [
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64),
        *(c_float, c_void_p, c_void_p),
    ]
    loaded.hasten_grouped.restype = c_int64
    loaded.hasten_grouped.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
    loaded.hasten_rank.restype = None
    loaded.hasten_rank.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
    loaded.hasten_grow.restype = None
    loaded.hasten_grow.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]
    loaded.hasten_linear.restype = None
    loaded.hasten_linear.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
    runtime = openmp_runtime()
    if runtime is not None:
        loaded.hasten_borrow(os.fsencode(runtime))
    wanted, chosen = os.environ.get("HASTEN_NATIVE"), loaded.hasten_kernels().decode()
    if wanted and wanted != chosen:
        raise UserError(
            f"HASTEN_NATIVE is {wanted!r}, which is none of {', '.join(INSTRUCTION_SETS)}, or not in this processor"
        )
    return loaded


def require_sizes(file: Path, loaded: ctypes.CDLL, function: str, ours: list[int]) -> None:
    """Refuse a library whose structures have other sizes than ours: it would read something else from them.

    Args:
        file: that it was loaded from.
        function: tells the library's sizes, with a zero behind them.

    Raises:
        UserError: it has.
    """
    sizes = getattr(loaded, function, None)
    if sizes is not None:
        sizes.restype, sizes.argtypes = ctypes.POINTER(c_int64), []
    if sizes is None or [*takewhile(bool, sizes())] != ours:
        raise UserError(f"{file} was built from another version of hasten: reinstall hasten")


def kernels() -> str | None:
    """The chosen one of `INSTRUCTION_SETS`; None without the library."""
    loaded = library()
    return None if loaded is None else str(loaded.hasten_kernels().decode())


class Team:
    """Threads that run a step together with the one that asks for it.

    Each thread has a team of its own, so that none ever waits for another's step, or ends a team that is at work.

    Args:
        loaded: the library.
        count: threads, the asking one included.
    """

    def __init__(self, loaded: ctypes.CDLL, count: int) -> None:
        self.loaded, self.count = loaded, count
        self._process = os.getpid()
        self.handle = int(loaded.hasten_team(count))

    def __del__(self) -> None:
        # In a forked process its threads are not there to go home.
        if self._process == os.getpid():
            self.loaded.hasten_disband(self.handle)


class _Own(threading.local):
    """The calling thread's teams, by how many threads they have."""

    def __init__(self) -> None:
        self.teams: dict[int, Team] = {}


_own = _Own()


def team(count: int = 0) -> int:
    """The handle of the calling thread's team of so many threads; 0: as many as PyTorch's has in this thread."""
    loaded, count = library(), count or torch.get_num_threads()
    assert loaded is not None
    mine = _own.teams.get(count)
    if mine is None or mine.loaded is not loaded:
        mine = _own.teams[count] = Team(loaded, count)
    return mine.handle
