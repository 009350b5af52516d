"""Runs a decoder's default forward pass by `step.cpp`: one call per step, over the cache's own memory.

Every row is computed in an order that does not depend on the rows beside it, so plain decoding, verification and every
batch give the same bits. Long pieces of prompts (more than `SHORT` rows of a sequence) go to PyTorch, whose matrix
products are made for them, and so does a pass with taps.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hasten.model.decoder import Decoder, TorchBackend
from hasten.model.linear import Linear
from hasten.model.rows import Rows, Span
from hasten.model.taps import Taps

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig

LIBRARY = Path(__file__).with_name("_step.so")
PANEL = 32
"""Outputs of a panel; as in `step.cpp`."""
SHORT = 64
"""Rows of one sequence up to which the native pass computes them."""


class _Linear(ctypes.Structure):
    _fields_: ClassVar[Any] = [("panels", c_void_p), ("bias", c_void_p), ("outputs", c_int64), ("inputs", c_int64)]


class _Layer(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary")),
        ("norm_eps", c_float),
        ("rope_factor", c_float),
        ("inverse_frequencies", c_void_p),
        ("final_norm", c_void_p),
        ("head", _Linear),
        ("layer", c_void_p),
    ]


class _View(ctypes.Structure):
    """A cache block: its storage [2, layers, kv_heads, capacity, head_dim], and how many slots are committed."""

    _fields_: ClassVar[Any] = [("storage", c_void_p), ("capacity", c_int64), ("length", c_int64)]


class _Span(ctypes.Structure):
    """A sequence's rows `start .. stop`; `pending` counts them and those that earlier passes left."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("start", "stop", "pending")),
        ("mask", c_void_p),
        ("views", c_int64),
        ("view", c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """The library; None where it was not built or cannot be loaded."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    library.hasten_team.restype, library.hasten_team.argtypes = c_void_p, [ctypes.c_int]
    library.hasten_disband.restype, library.hasten_disband.argtypes = None, [c_void_p]
    library.hasten_pack.restype, library.hasten_pack.argtypes = None, [c_void_p, c_int64, c_int64, c_void_p]
    library.hasten_forward.restype = None
    library.hasten_forward.argtypes = [
        *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64),
        *(c_void_p, c_int64, c_void_p, c_void_p),
    ]
    return library


def refusal(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a model cannot run natively, in a few words; None if it can."""
    if device.type != "cpu" or dtype != torch.float32:
        return "it runs float32 on CPU only"
    if any(layer.kind != "attention" or layer.window is not None for layer in config.layers):
        return "it knows neither sliding windows nor recurrent layers"
    if len({(layer.heads, layer.kv_heads, layer.head_dim, layer.ffn) for layer in config.layers}) > 1:
        return "all layers must have one shape"
    if _library() is None:
        return "it was not built (no C++ compiler when hasten was installed)"
    return None


class NativeBackend:
    """See the module. Holds the weights a second time, in panels; PyTorch's copy reads long prompts."""

    name = "native"

    def __init__(self) -> None:
        self._torch = TorchBackend()
        self._model: _Model | None = None
        self._kept: list[Any] = []
        self._team: tuple[int, int] = (0, 0)
        self._disband: Callable[[], object] | None = None

    @torch.inference_mode()
    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int] | None, taps: Taps | None) -> Tensor:
        if taps is not None:
            return self._torch.forward(model, rows, wanted, taps)
        # A range counts negative numbers from the end, and refuses those beyond it: native code would read on.
        every = range(rows.tokens.shape[0])
        numbers = list(every) if wanted is None else [every[number] for number in wanted]
        long = [span for span in rows.spans if span.stop - span.start > SHORT]
        if not long:
            return self._short(model, rows, numbers)
        if len(long) == len(rows.spans):
            return self._torch.forward(model, rows, wanted, None)
        logits = torch.empty(len(numbers), model.head.out_features)
        for spans in (long, [span for span in rows.spans if span.stop - span.start <= SHORT]):
            part, places = _part(rows, spans)
            chosen = [index for index, number in enumerate(numbers) if number in places]
            inside = [places[numbers[index]] for index in chosen]
            native = spans is not long
            result = self._short(model, part, inside) if native else self._torch.forward(model, part, inside, None)
            logits[torch.tensor(chosen, dtype=torch.int64)] = result
        return logits

    def _short(self, model: Decoder, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """The native pass."""
        library = _library()
        assert library is not None
        native = self._pack(model, library)
        kept: list[Any] = []
        spans = (_Span * len(rows.spans))()
        for index, span in enumerate(rows.spans):
            span.sequence.begin(rows.positions[span.start : span.stop], span.extend)
            blocks = span.sequence.blocks()
            views = (_View * len(blocks))(
                *(_View(block.storage[0].data_ptr(), block.capacity, length) for block, length in blocks)
            )
            mask = None if span.mask is None else span.mask.contiguous()
            kept += [views, mask]
            spans[index] = _Span(
                span.start,
                span.stop,
                span.sequence.pending,
                None if mask is None else mask.data_ptr(),
                len(blocks),
                ctypes.addressof(views),
            )
        embedded, positions = model.embed(rows).contiguous(), rows.positions.contiguous()
        numbers = torch.tensor(wanted, dtype=torch.int64)
        logits = torch.empty(len(wanted), model.head.out_features)
        library.hasten_forward(
            *(ctypes.addressof(native), self._threads(library), embedded.shape[0]),
            *(embedded.data_ptr(), positions.data_ptr(), len(spans), ctypes.addressof(spans)),
            *(len(wanted), numbers.data_ptr(), logits.data_ptr()),
        )
        return logits

    def _threads(self, library: ctypes.CDLL) -> int:
        """The team of threads, as many as PyTorch has."""
        count = torch.get_num_threads()
        if self._team[0] != count:
            if self._disband is not None:
                self._disband()
            self._team = (count, library.hasten_team(count))
            self._disband = weakref.finalize(self, library.hasten_disband, self._team[1])
        return self._team[1]

    def _pack(self, model: Decoder, library: ctypes.CDLL) -> _Model:
        """The model's weights in panels, made at the first pass."""
        if self._model is not None:
            return self._model
        config, shape = model.config, model.config.layers[0]

        def pointer(values: Tensor | None) -> int | None:
            if values is None:
                return None
            self._kept.append(values.detach().float().contiguous().clone())
            return int(self._kept[-1].data_ptr())

        def panels(piece: Linear) -> _Linear:
            weight = piece.dequant().float().contiguous()
            outputs, inputs = weight.shape
            # Aligned to a cache line, so that no load crosses one.
            room = torch.empty(-(-outputs // PANEL) * PANEL * inputs + 16)
            packed = room[-room.data_ptr() % 64 // 4 :]
            library.hasten_pack(weight.data_ptr(), outputs, inputs, packed.data_ptr())
            self._kept.append(room)
            return _Linear(packed.data_ptr(), pointer(getattr(piece, "bias", None)), outputs, inputs)

        layers = (_Layer * len(model.layers))()
        for index, layer in enumerate(model.layers):
            attention, mlp = layer.attention, layer.mlp
            layers[index] = _Layer(
                pointer(layer.attention_norm.weight),
                pointer(None if attention.query_norm is None else attention.query_norm.weight),
                pointer(None if attention.key_norm is None else attention.key_norm.weight),
                pointer(layer.mlp_norm.weight),
                *(panels(piece) for piece in (attention.qkv, attention.out, mlp.gate_up, mlp.down)),
            )
        self._kept.append(layers)
        self._model = _Model(
            *(len(layers), config.hidden_size, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn),
            *(model.head.out_features, config.norm_eps, config.rope_factor),
            pointer(torch.tensor(config.inverse_frequencies)),
            pointer(model.norm.weight),
            panels(model.head),
            ctypes.addressof(layers),
        )
        return self._model


def _part(rows: Rows, spans: Sequence[Span]) -> tuple[Rows, dict[int, int]]:
    """The rows of some spans, packed anew, and the new number of each old one."""
    numbers = [number for span in spans for number in range(span.start, span.stop)]
    packed: list[Span] = []
    for span in spans:
        start = packed[-1].stop if packed else 0
        packed.append(Span(span.sequence, start, start + span.stop - span.start, span.mask, span.extend))
    index = torch.tensor(numbers)
    embeddings = None if rows.embeddings is None else rows.embeddings[index]
    return Rows(rows.tokens[index], rows.positions[index], packed, embeddings), {
        old: new for new, old in enumerate(numbers)
    }
