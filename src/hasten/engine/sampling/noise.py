"""Random numbers keyed by (seed, choice, position): nothing a request draws depends on batch, method or step."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BELOW_ONE = 1 - 2.0**-53
"""The largest float64 below 1: half a unit above the last of 2^53 steps rounds to 1, whose Gumbel noise is infinite."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix(*words: int, state: int = 0) -> int:
    """Hash integers to 64 bits: the SplitMix64 finaliser (Steele et al. 2014), chained.

    `mix(a, b)` is `mix(b, state=mix(a))`.
    """
    for word in words:
        state = (state + word + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX2) & _MASK
        state ^= state >> 31
    return state


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Sequence[int], counters: Tensor) -> Tensor:
    """Numbers in (0, 1): row i is the SplitMix64 stream of `keys[i]` at `counters`.

    Integer arithmetic throughout, so every device gives the same bits.

    Args:
        keys: 64-bit keys, one per row.
        counters: int64 [count] for all rows, or [rows, count].

    Returns:
        float64 [rows, count].
    """
    key = torch.tensor([[_signed(k)] for k in keys], device=counters.device)
    z = key + (counters + 1) * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double().add_(0.5).mul_(2.0**-53).clamp_(max=_BELOW_ONE)


def gumbel(keys: Sequence[int], counters: Tensor) -> Tensor:
    """Standard Gumbel noise as `uniform`, float32."""
    return -torch.log(-torch.log(uniform(keys, counters))).float()


def gumbels(key: int, counters: Sequence[int]) -> list[float]:
    """`gumbel` of one key at a few counters, in plain integers: there, tensors cost more than they save. float64."""
    noise = []
    for counter in counters:
        z = (key + (counter + 1) * _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _MIX1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX2) & _MASK
        z ^= z >> 31
        noise.append(-log(-log(min(((z >> 11) + 0.5) * 2.0**-53, _BELOW_ONE))))
    return noise


def gumbel_array(key: int, counters: NDArray[np.int64]) -> NDArray[np.float32]:
    """`gumbel` of one key, in NumPy: it computes on the thread that asks. float32, shaped as `counters`."""
    z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    z ^= z >> np.uint64(31)
    uniforms = np.minimum(((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53, _BELOW_ONE)
    return -np.log(-np.log(uniforms)).astype(np.float32)


class Uniforms:
    """A stream of uniforms for one request's position: the coins of the rejection rules."""

    def __init__(self, *key: int) -> None:
        self._key, self._count = mix(*key), 0

    def draw(self) -> float:
        """The next number in (0, 1)."""
        self._count += 1
        return min(((mix(self._key, self._count) >> 11) + 0.5) * 2.0**-53, _BELOW_ONE)
