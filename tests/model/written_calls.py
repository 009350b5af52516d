"""Calls of native code, to be made here, and by a program for another processor over a copy of this memory."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NAMES = ("hasten_linear", "hasten_forward", "hasten_chain", "hasten_sample")
"""In the order of `Name` in native_calls.cpp, each with the address of its team left out."""


class Calls:
    """Memory, and calls that read and write it."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Any, int, bool]] = {}
        self._calls: list[tuple[int, ...]] = []

    def add(self, part: Any) -> int:
        """A tensor, an array, or a structure with addresses of other parts in it; returns its own."""
        if isinstance(part, Tensor):
            address, size = part.data_ptr(), part.nbytes
        elif isinstance(part, np.ndarray):
            address, size = part.ctypes.data, part.nbytes
        else:
            address, size = ctypes.addressof(part), ctypes.sizeof(part)
        if size:
            self._parts[address] = part, size, not isinstance(part, Tensor)
        return address

    def call(self, name: str, *arguments: int) -> None:
        """To be made behind those before it; arguments that are addresses are those of parts."""
        self._calls.append((NAMES.index(name), *arguments, *[0] * (9 - len(arguments))))

    def written(self) -> bytes:
        """The memory as it is now, and the calls."""
        starts = sorted(self._parts)
        parts = [(ctypes.string_at(start, self._parts[start][1]), self._parts[start][2]) for start in starts]
        parts.append((np.array(self._calls, np.int64).tobytes(), True))
        ends = [start + self._parts[start][1] for start in starts]
        written = [np.array([len(parts)])]
        for content, structured in parts:
            found = np.frombuffer(content[: len(content) // 8 * 8], np.int64) if structured else np.empty(0, np.int64)
            numbers = [bisect_right(starts, word) - 1 for word in found]
            addresses = [
                (8 * index, number, word - starts[number])
                for index, (word, number) in enumerate(zip(found.tolist(), numbers, strict=True))
                if number >= 0 and word < ends[number]
            ]
            written += [np.array([len(content), len(addresses)]), np.frombuffer(content, np.uint8), np.array(addresses)]
        return b"".join(each.astype(each.dtype if each.dtype == np.uint8 else np.int64).tobytes() for each in written)

    def make(self, step: ctypes.CDLL, sampler: ctypes.CDLL, team: int) -> None:
        """Here and now."""
        made: dict[str, Callable[..., Any]] = {
            "hasten_linear": lambda weight, *rest: step.hasten_linear(weight, team, *rest[:4]),
            "hasten_forward": lambda model, batch, *_: step.hasten_forward(model, team, batch, -1),
            "hasten_chain": lambda model, *rest: step.hasten_chain(model, team, *rest[:5], 0.0, *rest[5:7]),
            "hasten_sample": lambda *arguments: sampler.hasten_sample(*arguments[:6]),
        }
        for name, *arguments in self._calls:
            made[NAMES[name]](*arguments)

    def parts_of(self, memory: bytes) -> dict[int, NDArray[np.uint8]]:
        """All parts by their addresses, as a program has written them."""
        parts, at = {}, 0
        for start in sorted(self._parts):
            size = self._parts[start][1]
            parts[start] = np.frombuffer(memory, np.uint8, size, at)
            at += size
        return parts
