"""Loads the library, and mirrors its structures: sizes are compared then, fields go by name."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hasten.model.native.library import require_sizes

LIBRARY = Path(__file__).with_name("_sample.so")


class RuleStruct(ctypes.Structure):
    """`struct Rule`."""

    _fields_: ClassVar[Any] = [
        *(
            (name, c_float)
            for name in ("temperature", "tame", "top_p", "log_min_p", "repetition", "presence", "frequency")
        ),
        ("top_k", c_int64),
        ("stream", c_uint64),
        *((name, c_void_p) for name in ("bias_tokens", "bias_values")),
        ("biases", c_int64),
        *((name, c_void_p) for name in ("seen", "counts")),
    ]


WALK = np.dtype(
    [
        *((name, np.int64) for name in ("rule", "logits", "stride", "position", "nodes", "above_count")),
        *((name, np.int64) for name in ("allowed_bytes", "tokens", "parents", "above", "allowed", "path")),
        *((name, np.int64) for name in ("length", "token")),
    ]
)
"""`struct Walk`: a record of a NumPy array, since those of a step are made at once."""

CANDIDATE_BYTES = 8
"""`struct Candidate`: of the scratch memory, per token."""


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was not built or cannot be loaded.

    Raises:
        UserError: it was built from another version's sources.
    """
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    require_sizes(LIBRARY, loaded, "hasten_sampling_sizes", [ctypes.sizeof(RuleStruct), WALK.itemsize, CANDIDATE_BYTES])
    loaded.hasten_sample.restype = None
    loaded.hasten_sample.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
    loaded.hasten_leaders.restype = None
    loaded.hasten_leaders.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p]
    return loaded
