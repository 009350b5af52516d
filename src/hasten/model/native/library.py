"""Loads the native library and keeps its team of threads."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_step.so")


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was not built or cannot be loaded."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    loaded.hasten_kernels.restype, loaded.hasten_kernels.argtypes = c_char_p, []
    loaded.hasten_borrow.restype, loaded.hasten_borrow.argtypes = c_int, [c_char_p]
    loaded.hasten_team.restype, loaded.hasten_team.argtypes = c_void_p, [c_int]
    loaded.hasten_disband.restype, loaded.hasten_disband.argtypes = None, [c_void_p]
    loaded.hasten_forward.restype, loaded.hasten_forward.argtypes = c_int, [c_void_p, c_void_p, c_void_p]
    loaded.hasten_chain.restype = c_int64
    loaded.hasten_chain.argtypes = [
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64),
        *(c_float, c_void_p, c_void_p),
    ]
    loaded.hasten_linear.restype = None
    loaded.hasten_linear.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
    runtime = _openmp()
    if runtime is not None:
        loaded.hasten_borrow(os.fsencode(runtime))
    return loaded


def _openmp() -> str | None:
    """The file of the OpenMP runtime that PyTorch has loaded, where it is GNU's (as in its builds for Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line}
    return next((file for file in files if "torch" in file), None)


def kernels() -> str | None:
    """The chosen instruction set: `amx`, `avx512bf16`, `avx512`, `avx2` or `portable`; None without the library."""
    loaded = library()
    return None if loaded is None else str(loaded.hasten_kernels().decode())


class Team:
    """The threads that all native work shares: PyTorch's own where they can be borrowed, and as many as it has."""

    count = 0
    handle = 0

    @classmethod
    def get(cls) -> int:
        """The team's handle. A team of another size takes the place of the last one."""
        count = torch.get_num_threads()
        if count != cls.count:
            loaded = library()
            assert loaded is not None
            if cls.handle:
                loaded.hasten_disband(cls.handle)
            cls.count, cls.handle = count, loaded.hasten_team(count)
        return cls.handle
