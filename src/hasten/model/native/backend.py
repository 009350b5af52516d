"""Runs a decoder's default forward pass by `step.cpp`: one call per step, over the cache's own memory.

Every row is computed in an order that does not depend on the rows beside it, so plain decoding, verification and every
batch give the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64
from typing import TYPE_CHECKING, Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hasten.model.config import Slots
from hasten.model.decoder import Decoder, compose
from hasten.model.gate import Gate, compose_gated
from hasten.model.layers import LONELY, PairedLayer, additive_mask
from hasten.model.linear import StackedLinear
from hasten.model.native.blocks import BlockLinear, stored_format
from hasten.model.native.description import description, format_of
from hasten.model.native.library import library, team
from hasten.model.native.linear import LANES, BlockFormat, PanelLinear, Panels
from hasten.model.native.rounding import Rounded
from hasten.model.native.structs import (
    BatchStruct,
    GateStruct,
    JoinStruct,
    ModelStruct,
    SlotsStruct,
    SpanStruct,
    TapStruct,
    ViewStruct,
)
from hasten.model.rows import Rows, SequenceState, Span
from hasten.model.sharing import attend_spans
from hasten.model.taps import Site, Taps
from hasten.model.weights import HEAD, Blocks, Piece, Source

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig


SITES = get_args(Site)


class _Slots:
    """A sequence's slots as `step.cpp` reads them: from pass to pass little changes but how many there are.

    Attributes:
        address: of the structures, one per group.
        plain: whether all of them are plain memory.
    """

    def __init__(self, groups: int) -> None:
        self._slots = (SlotsStruct * groups)()
        self._views: list[Any] = [()] * groups
        # Addresses, not the blocks: a sequence that is over gives its memory back.
        self._places: list[Any] = [None] * groups
        self.address, self.plain = ctypes.addressof(self._slots), True

    def follow(self, sequence: SequenceState) -> None:
        """As they are now."""
        self.plain = True
        for group, known in enumerate(self._places):
            memory = sequence.memory(group)
            places = None if memory is None else [(*block.addresses, block.capacity) for block, _ in memory]
            if places != known:
                self._places[group], self._views[group] = places, _views(places or [])
                self._slots[group] = SlotsStruct(views=len(places or []), view=ctypes.addressof(self._views[group]))
            if memory is None:
                self.plain = False
                continue
            for view, (_, length) in zip(self._views[group], memory, strict=True):
                view.length = length


def _views(places: Sequence[tuple[int, int, int, int]]) -> ctypes.Array[ViewStruct]:
    """Blocks by the addresses of their keys, values and positions, and their capacity."""
    views = [
        ViewStruct(keys=keys, values=values, positions=positions, capacity=capacity)
        for keys, values, positions, capacity in places
    ]
    return (ViewStruct * len(views))(*views)


def refusal(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a model cannot run natively, in a few words; None if it can."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "it runs float32 and bfloat16 on CPU only"
    if not all(isinstance(layer.keeps, Slots) for layer in config.layers):
        return "it knows layers with keys and values of their own only"
    if len({(layer.heads, layer.keeps, layer.ffn) for layer in config.layers}) > 1:
        return "all layers must have one shape"
    if config.layers[0].ffn % LANES:
        return f"feed-forward layers must have a multiple of {LANES} channels"
    if library() is None:
        return "it was not built (no C++ compiler when hasten was installed)"
    return None


class NativeBackend:
    """Stores weights in panels and runs a decoder's default forward as one native call.

    Args:
        dtype: of the model, float32 or bfloat16.
        layers: what the weights of layers are rounded to; None where they stay as they are, stored blocks included.
        head: the same of the head.
    """

    name = "native"

    def __init__(self, dtype: torch.dtype, layers: Rounded | None = None, head: Rounded | None = None) -> None:
        self.dtype, self.layers, self.head = dtype, layers, head
        self._described: WeakKeyDictionary[Decoder, ModelStruct | None] = WeakKeyDictionary()
        self._slots: WeakKeyDictionary[SequenceState, _Slots] = WeakKeyDictionary()

    def linear(self, piece: Piece, source: Source) -> Panels | StackedLinear:
        """See `hasten.model.decoder.Backend`. Weights stay as they are stored, unless they are to be rounded."""
        wanted, stored = self.head if source == HEAD else self.layers, piece.stored
        if (format := stored_format(stored)) is not None and wanted in (None, format):
            return self._as_stored(format, stored, piece.bias)
        if wanted is not None:
            return BlockLinear.rounded(wanted, piece.weight, piece.bias, self.dtype)
        # Files of mixed types spend more on values than on queries and keys.
        above, below = stored[:2], stored[2:]
        mixed = stored_format(above), stored_format(below)
        if source.name == "qkv" and len(stored) == 3 and mixed[0] is not None and mixed[1] is not None:
            count = sum(blocks.rows.shape[0] for blocks in above)
            bias, rest = (None, None) if piece.bias is None else (piece.bias[:count], piece.bias[count:])
            return StackedLinear([self._as_stored(mixed[0], above, bias), self._as_stored(mixed[1], below, rest)])
        return PanelLinear(piece.weight, piece.bias, format_of(self.dtype))

    def _as_stored(self, format: BlockFormat, stored: Sequence[Blocks], bias: Tensor | None) -> BlockLinear:
        """Of blocks of that format, one matrix below the other."""
        return BlockLinear(format, torch.cat([blocks.rows for blocks in stored]), stored[0].inputs, bias, self.dtype)

    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int] | None, taps: Taps | None) -> Tensor:
        described = self.describe(model)
        # Taps go by the numbers of all layers.
        if described is None or (taps is not None and len(model.layers) < len(model.config.layers)):
            return compose(model, rows, wanted, taps)
        return self._step(model, described, rows, wanted, taps)

    def gated(
        self, model: Decoder, rows: Rows, wanted: Sequence[int] | None, gate: Gate, may: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `hasten.model.gate.compose_gated`."""
        described = self.describe(model)
        if described is None:
            return compose_gated(model, rows, wanted, gate, may)
        left = may.to(torch.int64) - 1
        skipped = torch.zeros(len(model.layers), len(left), dtype=torch.bool)
        struct = GateStruct(
            first=gate.first,
            last=gate.last,
            run=gate.run,
            threshold=gate.threshold,
            channels=gate.channels.data_ptr(),
            left=left.data_ptr(),
            skipped=skipped.data_ptr(),
        )
        return self._step(model, described, rows, wanted, None, struct), skipped

    def _step(
        self,
        model: Decoder,
        described: ModelStruct,
        rows: Rows,
        wanted: Sequence[int] | None,
        taps: Taps | None,
        gate: GateStruct | None = None,
    ) -> Tensor:
        """One native pass."""
        count = rows.tokens.shape[0]
        # A range counts negative numbers from the end, and refuses those beyond it: native code would read on.
        numbers = range(count) if wanted is None else [range(count)[number] for number in wanted]
        row_wanted = (c_int64 * len(numbers))(*numbers)
        loaded = library()
        assert loaded is not None
        if rows.beside is None and any(type(layer) is PairedLayer for layer in model.layers):
            raise ValueError(LONELY)
        spans, opaque, _masks = self.spans(described, rows)
        elsewhere = _Elsewhere(model, count, opaque) if opaque else None
        tokens, positions = rows.tokens.contiguous(), rows.positions.contiguous()
        embedded = None if rows.embeddings is None else rows.embeddings.float().contiguous()
        beside = None if rows.beside is None else rows.beside.contiguous()
        logits = torch.empty(len(numbers), model.head.out_features)
        states = {key: torch.empty(count, model.config.hidden_size) for key in (taps.wanted if taps else ())}
        sites = [
            TapStruct(site=SITES.index(site), layer=layer, states=state.data_ptr())
            for (site, layer), state in states.items()
        ]
        tapped = (TapStruct * len(sites))(*sites)
        entering = [
            JoinStruct(join.layer, first + place, source, *join.addresses(place))
            for first, source, join in rows.joins
            for place in range(len(join))
        ]
        joins = (JoinStruct * len(entering))(*entering)
        late = _late(count, entering)
        batch = BatchStruct(
            rows=count,
            tokens=tokens.data_ptr(),
            positions=positions.data_ptr(),
            axes=1 if positions.dim() == 1 else positions.shape[1],
            embedded=None if embedded is None else embedded.data_ptr(),
            spans=len(spans),
            span=ctypes.addressof(spans),
            wanted=len(numbers),
            row_wanted=ctypes.addressof(row_wanted),
            logits=logits.data_ptr(),
            taps=len(states),
            tap=ctypes.addressof(tapped),
            qkv=None if elsewhere is None else elsewhere.qkv.data_ptr(),
            mixed=None if elsewhere is None else elsewhere.mixed.data_ptr(),
            beside=None if beside is None else beside.data_ptr(),
            gate=None if gate is None else ctypes.addressof(gate),
            joins=len(joins),
            join=ctypes.addressof(joins),
            late=late,
            late_until=min((each.layer for each in entering if each.row >= count - late), default=0),
        )
        addresses, layer, layers = (ctypes.addressof(described), team(), ctypes.addressof(batch)), -1, len(model.layers)
        pauses = sorted(at for site, at in states if at and site == "input" and taps and (site, at) in taps.listeners)
        batch.pause = pauses[0] if pauses else 0
        while (layer := loaded.hasten_forward(*addresses, layer)) != layers:
            if layer < 0:
                raise IndexError(f"a token id is not below {model.embedding.shape[0]}, the size of the vocabulary")
            if layer == batch.pause and taps is not None:
                taps.put("input", layer, states.pop(("input", layer)).to(model.dtype))
                pauses.pop(0)
                batch.pause = pauses[0] if pauses else 0
            if elsewhere is not None:
                elsewhere.attend(model.layers[layer].index)
        if taps is not None:
            for (site, layer), state in states.items():
                taps.put(site, layer, state.to(model.dtype))
        return logits

    def spans(self, model: ModelStruct, rows: Rows) -> tuple[ctypes.Array[SpanStruct], list[Span], list[Tensor]]:
        """Spans that a pass begins with; those whose slots are not plain memory; masks, which must stay alive."""
        masks: list[Tensor] = []
        spans = (SpanStruct * len(rows.spans))()
        opaque = []
        for index, span in enumerate(rows.spans):
            span.sequence.begin(rows.positions[span.start : span.stop], span.extend)
            mask = span.dense_mask(span.sequence.pending)
            if mask is not None:
                masks.append(mask.contiguous())
            address = masks[-1].data_ptr() if mask is not None else None
            spans[index], plain = self.span(model, span, span.sequence.pending, address)
            if not plain:
                opaque.append(span)
        return spans, opaque, masks

    def span(self, model: ModelStruct, span: Span, pending: int, mask: int | None) -> tuple[SpanStruct, bool]:
        """A sequence's rows and slots, and whether all of these are plain memory; `mask` is an address."""
        slots = self._slots.get(span.sequence)
        if slots is None:
            slots = self._slots[span.sequence] = _Slots(len(span.sequence.layout.groups))
        slots.follow(span.sequence)
        group_of, index_of = span.sequence.layout.addresses(model.numbers)
        described = SpanStruct(
            start=span.start,
            stop=span.stop,
            pending=pending,
            mask=mask,
            slots=slots.address,
            group_of=group_of,
            index_of=index_of,
        )
        return described, slots.plain

    def runs(self, model: Decoder) -> bool:
        """Whether the native step knows all pieces of a model; others are composed in PyTorch."""
        return self.describe(model) is not None

    def describe(self, model: Decoder) -> ModelStruct | None:
        """The model as `step.cpp` sees it; None where some piece is none of those that it knows."""
        if model not in self._described:
            self._described[model] = description(model)
        return self._described[model]


class _Elsewhere:
    """Attention of spans whose slots are not plain memory in some layers: their own cache attends.

    Attributes:
        qkv: float32 [rows, (heads + 2 kv_heads) * head_dim], what the native step has projected and rotated.
        mixed: float32 [rows, heads * head_dim], what attention makes of it.
    """

    def __init__(self, model: Decoder, rows: int, spans: list[Span]) -> None:
        shape = model.config.layers[0]
        self._heads = [shape.heads, shape.slots.heads, shape.slots.heads]
        self._spans = [(span, additive_mask(span, model.cache_dtype)) for span in spans]
        # Rows that join later are not computed before, and must not be NaN: nothing sees them, at a weight of zero.
        self.qkv = torch.zeros(rows, sum(self._heads) * shape.slots.key_width)
        self.mixed = torch.empty(rows, shape.heads * shape.slots.key_width)

    def attend(self, layer: int) -> None:
        """Fill `mixed` for the spans that need it in this layer."""
        queries, keys, values = torch.split(self.qkv.view(len(self.qkv), sum(self._heads), -1), self._heads, 1)
        for span, mask in self._spans:
            if span.sequence.memory(span.sequence.layout.group_of[layer]) is None:
                self.mixed[span.start : span.stop] = attend_spans([span], [mask], layer, queries, keys, values)


def runs(model: Decoder) -> bool:
    """Whether calls of native code beside the backend's own know all pieces of a model, too."""
    return isinstance(model.backend, NativeBackend) and model.backend.runs(model)


def parts(model: Decoder) -> tuple[ctypes.CDLL, NativeBackend, ModelStruct]:
    """What such calls are made with: the library, the backend and the description of a model that `runs`."""
    loaded, backend = library(), model.backend
    assert loaded is not None and isinstance(backend, NativeBackend)
    described = backend.describe(model)
    assert described is not None
    return loaded, backend, described


def _late(count: int, entering: Sequence[JoinStruct]) -> int:
    """How many of the last rows enter at some layer."""
    numbers = {each.row for each in entering}
    return next((late for late in range(count) if count - 1 - late not in numbers), count)
