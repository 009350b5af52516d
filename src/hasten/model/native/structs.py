"""The structures of `step.cpp`. Sizes are compared when the library is loaded; fields go by name."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int64, c_void_p
from typing import Any, ClassVar


class LinearStruct(ctypes.Structure):
    """`struct Linear`."""

    _fields_: ClassVar[Any] = [
        ("format", c_int64),
        *((name, c_void_p) for name in ("panels", "scales", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "turned")),
    ]


class LayerStruct(ctypes.Structure):
    """`struct Layer`."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, LinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        ("window", c_int64),
        ("token_norm", c_void_p),
        ("values", LinearStruct),
    ]


class ModelStruct(ctypes.Structure):
    """`struct Model`, what it points to, and the numbers of its layers."""

    kept: list[Any]
    numbers: tuple[int, ...]
    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary")),
        ("norm_eps", c_float),
        ("rope_factor", c_float),
        ("inverse_frequencies", c_void_p),
        ("axis_of", c_void_p),
        ("embedding", c_void_p),
        ("embedding_format", c_int64),
        ("final_norm", c_void_p),
        ("head", LinearStruct),
        ("layer", c_void_p),
    ]


class ViewStruct(ctypes.Structure):
    """A block: its keys and values, each [layers, kv_heads, capacity, head_dim], and how many slots are committed."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("keys", "values", "positions")),
        ("capacity", c_int64),
        ("length", c_int64),
    ]


class SlotsStruct(ctypes.Structure):
    """The blocks of a group of layers; none where the slots are not plain memory."""

    _fields_: ClassVar[Any] = [("views", c_int64), ("view", c_void_p)]


class SpanStruct(ctypes.Structure):
    """A sequence's rows `start .. stop`; `pending` counts them and those that earlier passes left."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("start", "stop", "pending")),
        *((name, c_void_p) for name in ("mask", "slots", "group_of", "index_of")),
    ]


class TapStruct(ctypes.Structure):
    """Where the states [rows, hidden] of a site go; sites by their place in `Site`."""

    _fields_: ClassVar[Any] = [("site", c_int64), ("layer", c_int64), ("states", c_void_p)]


class GateStruct(ctypes.Structure):
    """`struct Gate`."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("first", "last", "run")),
        ("threshold", c_float),
        *((name, c_void_p) for name in ("channels", "left", "skipped")),
    ]


class JoinStruct(ctypes.Structure):
    """A row that enters at a layer, made of another row's state."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("layer", "row", "source")),
        *(("matrix", c_void_p), ("vector", c_void_p)),
    ]


class BatchStruct(ctypes.Structure):
    """`struct Batch`."""

    _fields_: ClassVar[Any] = [
        ("rows", c_int64),
        *(("tokens", c_void_p), ("positions", c_void_p), ("axes", c_int64), ("embedded", c_void_p)),
        *(("spans", c_int64), ("span", c_void_p), ("wanted", c_int64), ("row_wanted", c_void_p), ("logits", c_void_p)),
        *(("taps", c_int64), ("tap", c_void_p), ("qkv", c_void_p), ("mixed", c_void_p)),
        *((name, c_void_p) for name in ("beside", "gate")),
        *(("joins", c_int64), ("join", c_void_p), ("late", c_int64), ("late_until", c_int64)),
        ("pause", c_int64),
    ]


class GrowthStruct(ctypes.Structure):
    """`struct Growth`."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("fusion", "entrance", "words")),
        *(("width", c_int64), ("ranks", c_int64), ("least", c_double)),
    ]


class TreeStruct(ctypes.Structure):
    """`struct Tree`."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("span", "state")),
        *((name, c_int64) for name in ("position", "most", "depth", "closed_count")),
        *((name, c_void_p) for name in ("closed", "tokens", "parents", "estimates")),
        ("count", c_int64),
    ]


STRUCTS = (
    *(LinearStruct, LayerStruct, ModelStruct, ViewStruct, SlotsStruct, SpanStruct),
    *(TapStruct, GateStruct, JoinStruct, BatchStruct, GrowthStruct, TreeStruct),
)
"""In the order of `hasten_sizes`."""
