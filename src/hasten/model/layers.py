"""The pieces of a pre-norm decoder layer: norm, rotary embedding, attention, gated MLP.

A layer is a mixer, through which rows see others, and an MLP, through which they do not. Attention and a gated MLP are
one of each; whatever else keeps to `Mixer` and `MLP` can stand in their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.model.attention import additive
from hasten.model.config import LayerConfig
from hasten.model.linear import Linear
from hasten.model.rows import Span
from hasten.model.sharing import Level, attend_spans, levels
from hasten.model.taps import Taps


class RMSNorm:
    """Root-mean-square norm over the last axis."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps, self.shape = weight, eps, (weight.shape[0],)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class NoNorm(RMSNorm):
    """Stands where others have a norm, and leaves rows of so many channels as they are."""

    def __init__(self, width: int) -> None:
        super().__init__(torch.ones(width), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x


def overflow(x: Tensor) -> Tensor:
    """NaN for rows of x [..., channels] whose squares overflow, else 0: [..., 1].

    A norm divides such a row by infinity. The zeros that it leaves are finite, and what follows from them looks right.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind)
    return (length * 0).to(x.dtype)


class Rotary:
    """Rotary position embedding in the half-split layout of Hugging Face checkpoints.

    Args:
        inverse_frequencies: float32 [head_dim / 2].
        factor: scales cos and sin (yarn's attention factor).
        axes: by which axis of a position each of the frequencies turns (Qwen2-VL's sections); empty: by the first.
    """

    def __init__(self, inverse_frequencies: Tensor, factor: float, axes: Sequence[int] = ()) -> None:
        self.inverse_frequencies = torch.cat([inverse_frequencies, inverse_frequencies])
        self.factor = factor
        half = inverse_frequencies.shape[0]
        self.half = half
        self.sign = torch.cat([-torch.ones(half), torch.ones(half)]).to(inverse_frequencies.device)
        self.axes = torch.tensor([*axes, *axes] or [0] * 2 * half, device=inverse_frequencies.device)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each [rows, 1, head_dim], for positions [rows] or [rows, axes]; computed once per pass."""
        places = positions.to(self.inverse_frequencies.dtype)
        each = places.unsqueeze(-1) if positions.dim() == 1 else places[:, self.axes]
        angle = each * self.inverse_frequencies
        cos, sin = angle.cos() * self.factor, angle.sin() * self.sign * self.factor
        return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)

    def rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate [rows, heads, head_dim]."""
        cos, sin = angles
        return torch.addcmul(x * cos, x.roll(self.half, -1), sin)


@dataclass
class Pass:
    """What every layer of one forward pass shares.

    Attributes:
        positions: of the rows.
        spans: which rows belong to which sequence.
        masks: of each span's rows, additive, or as in `Span`.
        dtype: of the residual stream.
        beside: embeddings [rows, hidden] of the tokens that stand beside the rows; None where none do.
    """

    positions: Tensor
    spans: list[Span]
    masks: list[Tensor | Literal["all"] | None]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    taps: Taps | None
    beside: Tensor | None = None
    _angles: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _levels: dict[tuple[int, ...], list[Level]] = field(default_factory=dict)

    def angles(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """`Rotary.angles` of the rows, computed once for all layers that share it."""
        if rotary not in self._angles:
            self._angles[rotary] = rotary.angles(self.positions, self.dtype)
        return self._angles[rotary]

    def levels(self, layer: int) -> list[Level]:
        """What the spans share of a layer's slots, found once for all layers whose slots are kept together."""
        if len(self.spans) == 1:
            return []
        groups = tuple(span.sequence.layout.group_of[layer] for span in self.spans)
        if groups not in self._levels:
            self._levels[groups] = levels(self.spans, layer)
        return self._levels[groups]


class Mixer(Protocol):
    """Lets a span's rows see each other and what is in the cache: attention, a recurrence."""

    def forward_add(self, x: Tensor, residual: Tensor, layer: int, step: Pass) -> Tensor:
        """What it makes of normed rows x [rows, hidden], plus the residual stream of the same shape.

        Args:
            layer: number of the layer, by which the sequences know what they keep for it.
        """

    def nbytes(self) -> int:
        """Of weights that a pass of few rows reads."""


class MLP(Protocol):
    """Works on each row by itself."""

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """What it makes of normed rows x [rows, hidden], plus the residual stream of the same shape."""

    def nbytes(self) -> int:
        """Of weights that a pass of few rows reads."""


class Attention:
    """Grouped-query attention with optional per-head query/key norms (Qwen3) and biases (Qwen2)."""

    def __init__(
        self,
        config: LayerConfig,
        qkv: Linear,
        out: Linear,
        rotary: Rotary,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        self.config, self.qkv, self.out, self.rotary = config, qkv, out, rotary
        self.query_norm, self.key_norm = query_norm, key_norm

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [rows, heads, d] and keys [rows, kv_heads, d], and values [rows, kv_heads, d]."""
        heads, kv_heads = self.config.heads, self.config.slots.heads
        qkv = self.qkv.forward(x).view(x.shape[0], heads + 2 * kv_heads, self.config.slots.key_width)
        turning, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.query_norm is not None and self.key_norm is not None:
            turning = torch.cat(
                [self.query_norm.forward(turning[:, :heads]), self.key_norm.forward(turning[:, heads:])], 1
            )
        turned = self.rotary.rotate(turning, angles)
        return turned[:, :heads], turned[:, heads:], values

    def forward_add(self, x: Tensor, residual: Tensor, layer: int, step: Pass) -> Tensor:
        """See `Mixer`."""
        mixed = self.mix(layer, *self.project(x, step.angles(self.rotary)), step)
        return self.out.forward_add(mixed, residual)

    def nbytes(self) -> int:
        return self.qkv.nbytes() + self.out.nbytes()

    def mix(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, step: Pass) -> Tensor:
        """Store keys and values, then attend: [rows, heads * value_width] before the output projection."""
        dtype = step.cache_dtype
        turned = queries.to(dtype), keys.to(dtype), values.to(dtype)
        shared = step.levels(layer) if self.config.window is None else ()
        return attend_spans(step.spans, step.masks, layer, *turned, shared).to(queries.dtype)


def additive_mask(span: Span, dtype: torch.dtype) -> Tensor | Literal["all"] | None:
    """A span's mask for attention: 0 where a row sees another one and -inf elsewhere, if it is a tensor."""
    return additive(span.mask, dtype) if isinstance(span.mask, Tensor) else span.mask


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def inner(self, x: Tensor) -> Tensor:
        """[rows, ffn]: what the down projection reads."""
        gate, up = self.gate_up.forward(x).chunk(2, -1)
        return F.silu(gate).mul_(up)

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """See `MLP`."""
        return self.down.forward_add(self.inner(x), residual)

    def nbytes(self) -> int:
        return self.gate_up.nbytes() + self.down.nbytes()


LONELY = "this layer needs a token beside each row"


class Layer:
    """x + mixer(norm(x)), then x + mlp(norm(x)): `mix` and `feed`, to compose as one likes."""

    def __init__(self, index: int, mixer_norm: RMSNorm, mixer: Mixer, mlp_norm: RMSNorm, mlp: MLP) -> None:
        self.index = index
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def mix(self, x: Tensor, step: Pass) -> Tensor:
        """The residual stream [rows, hidden] behind the mixer."""
        normed = self.mixer_norm.forward(x)
        mixed = self.mixer.forward_add(self.read(normed, step), x, self.index, step)
        if step.taps is not None:
            step.taps.put("input", self.index, x)
            step.taps.put("attention_input", self.index, normed)
            step.taps.put("attention_output", self.index, mixed - x)
        return mixed

    def read(self, normed: Tensor, step: Pass) -> Tensor:
        """What the mixer reads of normed rows [rows, hidden]."""
        return normed

    def feed(self, x: Tensor, step: Pass) -> Tensor:
        """The residual stream [rows, hidden] behind the MLP."""
        normed = self.mlp_norm.forward(x)
        fed = self.mlp.forward_add(normed, x)
        if step.taps is not None:
            step.taps.put("mlp_input", self.index, normed)
            step.taps.put("output", self.index, fed)
        return fed

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        return self.feed(self.mix(x, step), step)

    def nbytes(self) -> int:
        """Of weights that a pass of few rows reads."""
        return self.mixer.nbytes() + self.mlp.nbytes()


class PairedLayer(Layer):
    """A layer whose mixer reads twice the width: a token's normed embedding, then the normed row that it stands beside.

    EAGLE-3's layer (2503.01840, section 3.1): rows are a model's states, and the token is the one that was chosen
    behind them. The residual stream is the rows'.
    """

    def __init__(
        self, index: int, token_norm: RMSNorm, mixer_norm: RMSNorm, mixer: Mixer, mlp_norm: RMSNorm, mlp: MLP
    ) -> None:
        super().__init__(index, mixer_norm, mixer, mlp_norm, mlp)
        self.token_norm = token_norm

    def read(self, normed: Tensor, step: Pass) -> Tensor:
        """[rows, 2 hidden].

        Raises:
            ValueError: no tokens stand beside the rows.
        """
        if step.beside is None:
            raise ValueError(LONELY)
        return torch.cat([self.token_norm.forward(step.beside), normed], -1)
