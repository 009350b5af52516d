"""A decoder-only transformer as pieces: embed, layers, norm, head, and their plain composition `forward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.model.attention import PER_HEAD_CAUSAL_ROWS
from hasten.model.config import ModelConfig, Slots
from hasten.model.layers import Layer, Pass, RMSNorm, additive_mask, overflow
from hasten.model.linear import Linear, fastest_linear
from hasten.model.rows import Rows
from hasten.model.taps import Taps
from hasten.model.weights import Piece, Source

NOT_FINITE = "the model's logits are not finite: its weights or constants are damaged, or overflow as it computes"
"""What a user is told of logits that no token can be chosen by."""

LEAST_ITEM, ROW_BYTES = 4, 128
"""For bounds: values are float32 at the least, whatever the weights are; and of a row, its numbers and norms."""


class Model(Protocol):
    """What the engine needs from a model; an analytic oracle can stand in for the network."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values."""

    def weight_bytes(self) -> int:
        """Bytes of weights that one forward pass of few rows reads."""

    def forward(self, rows: Rows, wanted: Sequence[int] | None = None, taps: Taps | None = None) -> Tensor:
        """Float32 logits [wanted rows, vocabulary] (all rows if `wanted` is None).

        The rows' keys and values are left pending in their sequences: the caller commits what it keeps.
        """


class Backend(Protocol):
    """Stores a decoder's weights and runs its default forward; chosen when the model is loaded."""

    name: str

    def linear(self, piece: Piece, source: Source) -> Linear:
        """A linear layer in the backend's storage, whose format may depend on which layer it is."""

    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int] | None, taps: Taps | None) -> Tensor:
        """As `Model.forward`."""


@dataclass(eq=False)
class Decoder:
    """The transformer. `embedding` is [vocabulary, hidden]; everything else is a piece with a `forward`."""

    config: ModelConfig
    embedding: Tensor
    layers: list[Layer]
    norm: RMSNorm
    head: Linear
    backend: Backend
    cache_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def weight_bytes(self) -> int:
        """Bytes of weights that one forward pass of few rows reads."""
        return self.head.nbytes() + sum(layer.nbytes() for layer in self.layers)

    def scratch_bytes(self, rows: int, masked: int, slots: int) -> int:
        """Bytes that a pass of so many rows takes for a while, at most, beside its logits; by any backend.

        Args:
            masked: pending rows that the rows of a span see through a mask, at most; causal ones need none.
            slots: that a row sees, at most, these included.
        """
        size, hidden = max(self.dtype.itemsize, LEAST_ITEM), self.config.hidden_size
        causal = min(rows, PER_HEAD_CAUSAL_ROWS) ** 2
        most = 0
        for layer in self.config.layers:
            # Another mixer than attention is taken for one head as wide as the model.
            slots_of = layer.keeps if isinstance(layer.keeps, Slots) else Slots(1, hidden, hidden)
            width, group = (layer.heads + 2 * slots_of.heads) * slots_of.key_width, layer.heads // slots_of.heads
            values = rows * (6 * hidden + max(8 * width, 3 * (width + layer.ffn)))
            masks = (group + 2) * (rows * (masked if layer.window is None else slots) + causal)
            scores = 0 if self.device.type == "cpu" else 3 * layer.heads * rows * slots
            most = max(most, values + masks + scores)
        return most * size + rows * ROW_BYTES

    def embed(self, rows: Rows) -> Tensor:
        """[rows, hidden] from token ids, or from the rows' own embeddings where the id is -1."""
        if rows.embeddings is None:
            return F.embedding(rows.tokens, self.embedding)
        tokens = F.embedding(rows.tokens.clamp(min=0), self.embedding)
        return torch.where((rows.tokens < 0).unsqueeze(-1), rows.embeddings.to(tokens.dtype), tokens)

    def start(self, rows: Rows, taps: Taps | None = None) -> Pass:
        """Open a pass: make the rows pending in their sequences and compute what all layers share."""
        for span in rows.spans:
            span.sequence.begin(rows.positions[span.start : span.stop], span.extend)
        return Pass(
            positions=rows.positions,
            spans=rows.spans,
            masks=[additive_mask(span, self.cache_dtype) for span in rows.spans],
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            taps=taps,
            beside=None if rows.beside is None else F.embedding(rows.beside, self.embedding),
        )

    def logits(self, hidden: Tensor, wanted: Sequence[int] | None) -> Tensor:
        """Final norm and head on the wanted rows of the residual stream only, in float32."""
        if wanted is not None and list(wanted) != list(range(hidden.shape[0])):
            hidden = hidden[torch.tensor(wanted, dtype=torch.int64, device=hidden.device)]
        return self.head.forward(self.norm.forward(hidden) + overflow(hidden)).float()

    def part(self, layers: Sequence[int]) -> Decoder:
        """Some of its layers only, over the same weights and caches; what it leaves out keeps nothing of its rows.

        Args:
            layers: ascending numbers.
        """
        return replace(self, layers=[self.layers[number] for number in layers])

    def forward(self, rows: Rows, wanted: Sequence[int] | None = None, taps: Taps | None = None) -> Tensor:
        """Logits of the wanted rows, by the backend. See `Model.forward`."""
        return self.backend.forward(self, rows, wanted, taps)


class TorchBackend:
    """The reference: the pieces composed in PyTorch, on every device."""

    name = "torch"

    def linear(self, piece: Piece, source: Source) -> Linear:
        return fastest_linear(piece.weight, piece.bias)

    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int] | None, taps: Taps | None) -> Tensor:
        return compose(model, rows, wanted, taps)


def joined(x: Tensor, rows: Rows, layer: int) -> Tensor:
    """The residual stream [rows, hidden] at a layer's input, with the rows that enter there."""
    for first, source, join in rows.joins:
        if join.layer == layer:
            x[first : first + len(join)] = join.of(x[source]).to(x.dtype)
    return x


@torch.inference_mode()
def compose(model: Decoder, rows: Rows, wanted: Sequence[int] | None, taps: Taps | None) -> Tensor:
    """`Model.forward` from the pieces, one after the other, whatever they are."""
    step = model.start(rows, taps)
    x = model.embed(rows)
    for layer in model.layers:
        x = layer.forward(joined(x, rows, layer.index), step)
    if taps is not None:
        taps.put("final_norm", 0, model.norm.forward(x))
    return model.logits(x, wanted)
