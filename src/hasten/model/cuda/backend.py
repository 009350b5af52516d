"""Runs a decoder's default forward pass on a GPU: captured graphs, and one copy to the device per step.

Passes are padded to the next of `BUCKETS` rows; each bucket is captured when it is first used, for as many splits of
the keys as the longest sequence needs (the next power of two). Nothing in a step waits for the device. Prompts (spans
of more than `SHORT` rows) go to PyTorch, whose matrix products and attention in parts are made for them.

With `invariant`, all passes run in pieces of `FIXED` rows, prompts too: the matrix products then always have the same
shape, attention sums in an order that is the row's own, and a row gets the same bits whatever stands beside it. The
price is that one row costs what `FIXED` rows cost, and that prompts are read slowly. A pass that cannot be cut so is
refused: PyTorch would compute it, and its rows would depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.cuda import dataflow
from hasten.model.cuda.attention import MAX_PENDING, Packed, Shape, attend_cache
from hasten.model.cuda.packing import MAX_VIEWS, Room, fits, sees_ahead
from hasten.model.cuda.pointwise import add_norm, gate, open_pass, rotate_and_store
from hasten.model.cuda.unified import Unified
from hasten.model.decoder import Decoder, TorchBackend
from hasten.model.layers import Attention, GatedMLP, Layer, RMSNorm, Rotary
from hasten.model.linear import DenseLinear, Linear, PackedLinear
from hasten.model.rows import Rows
from hasten.model.taps import Taps
from hasten.model.weights import Piece, Source

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of a captured pass."""
SHORT = 64
"""Rows of one sequence up to which the graphs compute them."""
FIXED = 64
"""Rows of every pass with `invariant`."""


class CudaBackend:
    """Captures and replays the steps of one model, whose weights must stay where they are.

    Args:
        invariant: a row's result never depends on the rows beside it.
        unified: attention takes a unified maximum per head where it serves (`hasten.model.cuda.unified`). With
            `invariant` it never does, because what it makes of a row would depend on the passes before; nor in float16,
            which has no room for weights above 1.

    Raises:
        UserError: by `forward`, with `invariant`, of a pass whose rows would depend on each other.

    On CPU, where the kernels run in Triton's interpreter, nothing is captured.
    """

    def __init__(self, invariant: bool = False, unified: bool = True) -> None:
        self.name = "cuda-invariant" if invariant else "cuda"
        self.invariant = invariant
        self.unified: Unified | None = None
        self._unify = unified and not invariant
        self._torch = TorchBackend()
        self._rooms: dict[int, Room] = {}
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._known: tuple[Decoder, bool] | None = None

    def linear(self, piece: Piece, source: Source) -> Linear:
        """With the kernels that were measured to be the fastest, except where one kernel must serve all passes."""
        if not self.invariant and dataflow.serves(piece.weight):
            return dataflow.measured(piece.weight, piece.bias)
        return self._torch.linear(piece, source)

    @torch.inference_mode()
    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int] | None, taps: Taps | None) -> Tensor:
        count = rows.tokens.shape[0]
        # A range counts negative numbers from the end, and refuses those beyond it.
        numbers = list(range(count)) if wanted is None else [range(count)[number] for number in wanted]
        once = list(dict.fromkeys(numbers))
        if len(once) < len(numbers):
            again = torch.tensor([once.index(number) for number in numbers], device=model.device)
            return self.forward(model, rows, once, taps)[again]
        rows = _on_device(rows, model)
        cuts = self._cuts(rows) if count and self.runs(model) else None
        if cuts is None:
            return self._torch.forward(model, rows, wanted, taps)
        with torch.cuda.device_of(model.embedding):  # type: ignore[no-untyped-call]
            for span in rows.spans:
                span.sequence.begin(rows.positions[span.start : span.stop], span.extend)
            if len(cuts) == 1:
                return self._piece(model, rows, *cuts[0], numbers, taps)
            places = {number: place for place, number in enumerate(sorted(numbers))}
            logits, parts = [], []
            for low, high in cuts:
                part = None if taps is None else Taps(taps.wanted)
                wanted_here = [number - low for number in places if low <= number < high]
                logits.append(self._piece(model, rows, low, high, wanted_here, part))
                parts.append(part)
            if taps is not None:
                for key in taps.wanted:
                    taps.put(*key, torch.cat([part.states[key] for part in parts if part is not None]))
            ascending = torch.cat(logits)
            if list(places) == numbers:
                return ascending
            return ascending[torch.tensor([places[number] for number in numbers], device=model.device)]

    def runs(self, model: Decoder) -> bool:
        """Whether the graphs know all pieces of a model; others are composed in PyTorch.

        Raises:
            UserError: they do not, and PyTorch would break what `invariant` promises.
        """
        if self._known is None or self._known[0] is not model:
            self._known = model, _knows(model)
        if self.invariant and not self._known[1]:
            raise UserError("invariant numerics on a GPU: the model has layers that the graphs do not know")
        return self._known[1]

    def _cuts(self, rows: Rows) -> list[tuple[int, int]] | None:
        """The pieces `low:high` in which the graphs compute a pass; None: PyTorch does.

        Raises:
            UserError: no pieces give what `invariant` promises.
        """
        total = rows.tokens.shape[0]
        if not self.invariant:
            short = all(span.stop - span.start <= SHORT for span in rows.spans)
            return [(0, total)] if short and total <= BUCKETS[-1] and fits(rows) else None
        if not fits(rows):
            raise UserError(
                f"invariant numerics on a GPU: a mask may have {MAX_PENDING} columns at most, and a sequence fewer "
                f"than {MAX_VIEWS} blocks, all of plain memory; positions have one axis, and no row "
                f"enters in the middle"
            )
        starts = [0]
        for span in rows.spans:
            if isinstance(span.mask, Tensor) and span.stop - starts[-1] > FIXED:
                if span.stop - span.start <= FIXED:
                    # A row may see any other of its span, so that these must be in one piece.
                    starts.append(span.start)
                elif sees_ahead(span.mask):
                    raise UserError(
                        f"invariant numerics on a GPU: {span.stop - span.start} rows see each other, as those of a "
                        f"canvas do, and {FIXED} at most can"
                    )
            while span.stop - starts[-1] > FIXED:
                starts.append(starts[-1] + FIXED)
        return list(zip(starts, [*starts[1:], total], strict=True))

    def _piece(
        self, model: Decoder, rows: Rows, low: int, high: int, wanted: Sequence[int], taps: Taps | None
    ) -> Tensor:
        """Logits of the wanted ones of the rows `low:high`, which are pending."""
        bucket = FIXED if self.invariant else next(size for size in BUCKETS if size >= high - low)
        if bucket not in self._rooms:
            self._rooms[bucket] = Room(bucket, model.head.out_features, model.device)
        room, shape = self._rooms[bucket], _shape(model)
        inputs = [rows.tokens[low:].data_ptr(), rows.positions[low:].data_ptr(), 0]
        if rows.embeddings is not None:
            inputs[2] = rows.embeddings[low:].data_ptr()
        if self._unify and self.unified is None and shape.dtype != torch.float16:
            self.unified = Unified(shape.layers, shape.heads, shape.kv_heads, model.device)
        packed = room.fill(inputs, rows, low, high, wanted, shape.tile)
        if taps is not None or model.device.type != "cuda":
            self._step(model, room, packed, shape, taps, high - low)
        else:
            self._replay(model, room, packed, shape)
        if self.unified is not None:
            self.unified.passed(high - low)
        if list(wanted) == list(range(high - low)):
            return room.logits[: high - low].clone()
        return room.logits.index_select(0, room.wanted[: len(wanted)])

    def _replay(self, model: Decoder, room: Room, packed: Packed, shape: Shape) -> None:
        """Run the step as a graph, captured at its first use."""
        key = (room.rows, packed.splits, packed.view_count)
        if key not in self._graphs:
            # Once outside: kernels are compiled and libraries opened, which a capture forbids.
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._step(model, room, packed, shape)
            here.wait_stream(aside)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(model, room, packed, shape)
            self._graphs[key] = graph
        self._graphs[key].replay()

    def _step(
        self, model: Decoder, room: Room, packed: Packed, shape: Shape, taps: Taps | None = None, count: int = 0
    ) -> None:
        """The forward pass of what the room describes, into `room.logits`; taps get the first `count` rows."""
        x, positions = open_pass(room.inputs, room.owners, packed, model.embedding)
        normed = model.layers[0].mixer_norm.forward(x)
        following = [layer.mixer_norm for layer in model.layers[1:]] + [model.norm]
        turned: dict[Rotary, tuple[Tensor, Tensor]] = {}
        for layer, next_norm in zip(model.layers, following, strict=True):
            attention, mlp, index = layer.mixer, layer.mlp, layer.index
            assert isinstance(attention, Attention) and isinstance(mlp, GatedMLP)
            if attention.rotary not in turned:
                turned[attention.rotary] = attention.rotary.angles(positions, model.dtype)
            angles = turned[attention.rotary]
            norms = None
            if attention.query_norm is not None and attention.key_norm is not None:
                norms = attention.query_norm, attention.key_norm
            qkv = attention.qkv.forward(normed)
            queries = rotate_and_store(qkv, angles, norms, room.owners, packed, shape, index)
            mixed = attend_cache(queries, packed, shape, index, self.unified).to(model.dtype)
            attended, mlp_input = add_norm(x, attention.out.forward(mixed), layer.mlp_norm)
            inner = gate(mlp.gate_up.forward(mlp_input))
            result, next_normed = add_norm(attended, mlp.down.forward(inner), next_norm)
            if taps is not None:
                taps.put("input", index, x[:count])
                taps.put("attention_input", index, normed[:count])
                taps.put("attention_output", index, (attended - x)[:count])
                taps.put("mlp_input", index, mlp_input[:count])
                taps.put("output", index, result[:count])
            x, normed = result, next_normed
        if taps is not None:
            taps.put("final_norm", 0, normed[:count])
        room.logits.copy_(model.head.forward(normed))


def _on_device(rows: Rows, model: Decoder) -> Rows:
    """The pass with everything that kernels read by address contiguous on the model's device."""
    spans = []
    for span in rows.spans:
        earlier = span.sequence.pending if span.extend else 0
        mask = span.dense_mask(earlier + span.stop - span.start)
        spans.append(span if mask is None else replace(span, mask=mask.to(model.device, torch.bool).contiguous()))
    embeddings = None if rows.embeddings is None else rows.embeddings.to(model.device, model.dtype).contiguous()
    tokens, positions = (each.to(model.device, torch.int64).contiguous() for each in (rows.tokens, rows.positions))
    return Rows(tokens, positions, spans, embeddings)


def _knows(model: Decoder) -> bool:
    """Whether a model has all its layers, made of exactly the pieces that `_step` runs, all attention of one shape."""
    if len(model.layers) < len(model.config.layers):
        return False
    linears, norms = [model.head], [model.norm]
    for layer in model.layers:
        attention, mlp = layer.mixer, layer.mlp
        # Exactly these: a subclass computes something else.
        if type(layer) is not Layer or type(attention) is not Attention or type(mlp) is not GatedMLP:
            return False
        linears += [attention.qkv, attention.out, mlp.gate_up, mlp.down]
        norms += [layer.mixer_norm, layer.mlp_norm]
        norms += [norm for norm in (attention.query_norm, attention.key_norm) if norm is not None]
    # A graph replays what a layer launched once, and what else it does (in Python) never again.
    plain = all(type(linear) in (DenseLinear, PackedLinear, dataflow.MeasuredLinear) for linear in linears)
    shapes = {(layer.heads, layer.keeps) for layer in model.config.layers}
    return plain and all(type(norm) is RMSNorm for norm in norms) and len(shapes) == 1


def _shape(model: Decoder) -> Shape:
    layer = model.config.layers[0]
    return Shape(len(model.layers), layer.heads, layer.slots.heads, layer.slots.key_width, model.cache_dtype)
