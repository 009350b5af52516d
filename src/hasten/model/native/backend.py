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
from hasten.model.layers import (
    LONELY,
    Attention,
    GatedMLP,
    Layer,
    NoNorm,
    PairedLayer,
    RMSNorm,
    additive_mask,
    attend_span,
)
from hasten.model.native.blocks import BlockLinear, stored_format
from hasten.model.native.library import library, team
from hasten.model.native.linear import FORMATS, LANES, Format, PanelLinear, Panels
from hasten.model.native.rounding import Rounded
from hasten.model.native.structs import (
    BatchStruct,
    GateStruct,
    JoinStruct,
    LayerStruct,
    LinearStruct,
    ModelStruct,
    SlotsStruct,
    SpanStruct,
    TapStruct,
    ViewStruct,
)
from hasten.model.rows import Rows, SequenceState, Span
from hasten.model.taps import Site, Taps
from hasten.model.weights import HEAD, Piece, Source

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig
    from hasten.model.linear import Linear


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

    def linear(self, piece: Piece, source: Source) -> Panels:
        """See `hasten.model.decoder.Backend`. Weights stay as they are stored, unless they are to be rounded."""
        wanted, stored = self.head if source == HEAD else self.layers, stored_format(piece.stored)
        if stored is not None and wanted in (None, stored):
            rows = torch.cat([blocks.rows for blocks in piece.stored])
            return BlockLinear(stored, rows, piece.stored[0].inputs, piece.bias, self.dtype)
        if wanted is None:
            return PanelLinear(piece.weight, piece.bias, _format(self.dtype))
        return BlockLinear.rounded(wanted, piece.weight, piece.bias, self.dtype)

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
            JoinStruct(layer=join.layer, row=first + place, source=source, matrix=join.address(place))
            for first, source, join in rows.joins
            for place in range(len(join.matrices))
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
            self._described[model] = _description(model)
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
        for span, mask in self._spans:
            if span.sequence.memory(span.sequence.layout.group_of[layer]) is None:
                own = self.qkv[span.start : span.stop].view(span.stop - span.start, sum(self._heads), -1)
                self.mixed[span.start : span.stop] = attend_span(span, mask, layer, *torch.split(own, self._heads, 1))


def _late(count: int, entering: Sequence[JoinStruct]) -> int:
    """How many of the last rows enter at some layer."""
    numbers = {each.row for each in entering}
    return next((late for late in range(count) if count - 1 - late not in numbers), count)


def _format(dtype: torch.dtype) -> Format:
    return "float32" if dtype == torch.float32 else "bfloat16"


def _struct(linear: Linear) -> LinearStruct | None:
    """What `step.cpp` reads of a linear layer, if it knows it. Exactly these: a subclass computes something else."""
    if type(linear) is PanelLinear or type(linear) is BlockLinear:
        return linear.struct
    return None


def _description(model: Decoder) -> ModelStruct | None:
    """See `NativeBackend.describe`; the structure keeps alive what it points to."""
    config, shape = model.config, model.config.layers[0]
    kept: list[Any] = []

    def pointer(values: Tensor | None) -> int | None:
        if values is None:
            return None
        kept.append(values.detach().float().contiguous())
        return int(kept[-1].data_ptr())

    def weight(norm: RMSNorm | None) -> int | None:
        return None if norm is None or type(norm) is NoNorm else pointer(norm.weight)

    slots = shape.slots
    hidden, width = config.hidden_size, shape.heads * slots.key_width
    # Of a layer's matrices. All layers must have those of the first: pruned ones may differ.
    sizes = [(hidden, width), (2 * shape.ffn, hidden), (hidden, shape.ffn)]
    head = _struct(model.head)
    if head is None or type(model.norm) not in (RMSNorm, NoNorm) or shape.ffn % LANES:
        return None
    if model.dtype not in (torch.float32, torch.bfloat16):
        return None
    layers = (LayerStruct * len(model.layers))()
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.mixer, layer.mlp
        # Exactly these: a subclass computes something else.
        if type(layer) not in (Layer, PairedLayer) or type(attention) is not Attention or type(mlp) is not GatedMLP:
            return None
        read = (width + 2 * slots.heads * slots.key_width, 2 * hidden if isinstance(layer, PairedLayer) else hidden)
        pieces = [attention.qkv, attention.out, mlp.gate_up, mlp.down]
        structs = [
            struct
            for piece, size in zip(pieces, [read, *sizes], strict=True)
            if (struct := _struct(piece)) is not None and (piece.out_features, piece.in_features) == size
        ]
        token_norm = layer.token_norm if isinstance(layer, PairedLayer) else None
        norms = layer.mixer_norm, layer.mlp_norm, attention.query_norm, attention.key_norm, token_norm
        if len(structs) < len(pieces) or any(type(norm) not in (RMSNorm, NoNorm, type(None)) for norm in norms):
            return None
        qkv, out, gate_up, down = structs
        layers[index] = LayerStruct(
            attention_norm=weight(layer.mixer_norm),
            query_norm=weight(attention.query_norm),
            key_norm=weight(attention.key_norm),
            mlp_norm=weight(layer.mlp_norm),
            token_norm=weight(token_norm),
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            window=config.layers[layer.index].window or 0,
        )
    axes = torch.tensor(config.rope_axes) if config.rope_axes else None
    kept += [layers, axes]
    described = ModelStruct(
        layers=len(layers),
        hidden=hidden,
        heads=shape.heads,
        kv_heads=slots.heads,
        head_dim=slots.key_width,
        ffn=shape.ffn,
        vocabulary=model.embedding.shape[0],
        norm_eps=config.norm_eps,
        rope_factor=config.rope_factor,
        inverse_frequencies=pointer(torch.tensor(config.inverse_frequencies)),
        axis_of=None if axes is None else axes.data_ptr(),
        embedding=model.embedding.data_ptr(),
        embedding_format=FORMATS.index(_format(model.dtype)),
        final_norm=weight(model.norm),
        head=head,
        layer=ctypes.addressof(layers),
    )
    described.kept, described.numbers = kept, tuple(layer.index for layer in model.layers)
    return described
