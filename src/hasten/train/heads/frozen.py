"""A target that stays as it is, through whose layers gradients reach rows that were put beside its text.

Nothing of the text sees these rows. So the text itself is read without gradients, once, and only the rows beside it are
read with them; as no weight changes, these cost two forward passes more, not three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UserError
from hasten.model import Decoder, load_model
from hasten.model.checkpoint import resolve
from hasten.model.layers import Attention, GatedMLP, Layer
from hasten.model.linear import DenseLinear, Linear


@dataclass(frozen=True)
class Inserted:
    """Rows beside texts that stand one behind the other.

    Attributes:
        layer: whose input they join.
        enter: what they are there, [inserted, hidden], given the texts' states [rows, hidden] at the same place.
        positions: int64 [inserted].
        bounds: [texts + 1], where each text's inserted rows begin, and where the last ones end.
        sees: per text, boolean [its inserted rows, its rows and then its inserted rows].
    """

    layer: int
    enter: Callable[[Tensor], Tensor]
    positions: Tensor
    bounds: Sequence[int]
    sees: Sequence[Tensor]


class Frozen:
    """The layers of a target whose mixers are attention.

    Raises:
        UserError: they are something else.
    """

    def __init__(self, model: Decoder) -> None:
        self.model, self.layers = model, [plain(layer) for layer in model.layers]
        self.head = DenseLinear(model.head.dequant())

    @classmethod
    def load(cls, parent: str, dtype: str) -> Self:
        """A checkpoint by name, folder or file, in a dtype."""
        return cls(load_model(resolve(parent), dtype, backend="torch"))

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def read(self, ids: Tensor, bounds: Sequence[int], inserted: Inserted) -> tuple[Tensor, Tensor]:
        """What the head reads of the texts, [rows, hidden], and, with gradients, of the inserted rows.

        Args:
            ids: int64 [rows].
            bounds: [texts + 1], where each text begins, and where the last one ends.
        """
        texts = [slice(*each) for each in pairwise(bounds)]
        beside = [slice(*each) for each in pairwise(inserted.bounds)]
        positions = torch.cat([torch.arange(text.stop - text.start) for text in texts])
        with torch.no_grad():
            x = F.embedding(ids, self.model.embedding)
        y = x[:0]
        for number, (layer, attention, mlp) in enumerate(self.layers):
            if number == inserted.layer:
                y = inserted.enter(x).to(x.dtype)
            with torch.no_grad():
                q, k, v = projected(layer, attention, x, positions)
                window = attention.config.window
                own = [attend(q[text], k[text], v[text], causal(text, window)) for text in texts]
                x = fed(layer, attention, mlp, x, torch.cat(own))
            if number < inserted.layer:
                continue
            # `q`, `k` and `v` are those of the layer's input, before `x` moved on.
            mine = projected(layer, attention, y, inserted.positions)
            mixed = []
            for text, rows, sees in zip(texts, beside, inserted.sees, strict=True):
                where = torch.cat([positions[text], inserted.positions[rows]])
                sees = _inside(sees, inserted.positions[rows], where, window)
                keys, values = (torch.cat([of[text], own[rows]]) for of, own in zip((k, v), mine[1:], strict=True))
                mixed.append(attend(mine[0][rows], keys, values, sees))
            y = fed(layer, attention, mlp, y, torch.cat(mixed))
        with torch.no_grad():
            x = self.model.norm.forward(x)
        return x, self.model.norm.forward(y)

    def logits(self, states: Tensor) -> Tensor:
        """Float32 [rows, vocabulary] of what `read` gives."""
        return self.head.forward(states).float()


def plain(layer: Layer) -> tuple[Layer, Attention, GatedMLP]:
    """A layer with its mixer and its MLP, whose products know gradients.

    Raises:
        UserError: another mixer than attention, or another MLP.
    """
    attention, mlp = layer.mixer, layer.mlp
    if type(attention) is not Attention or type(mlp) is not GatedMLP:
        raise UserError("only models of attention and gated MLPs can be trained for")
    attention.qkv, attention.out = _dense(attention.qkv), _dense(attention.out)
    mlp.gate_up, mlp.down = _dense(mlp.gate_up), _dense(mlp.down)
    return layer, attention, mlp


def _dense(linear: Linear) -> DenseLinear:
    return DenseLinear(linear.dequant(), getattr(linear, "bias", None))


def projected(layer: Layer, attention: Attention, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [rows, heads or kv_heads, width]."""
    return attention.project(layer.mixer_norm.forward(x), attention.rotary.angles(positions, x.dtype))


def fed(layer: Layer, attention: Attention, mlp: GatedMLP, x: Tensor, mixed: Tensor) -> Tensor:
    """The residual stream behind a layer, from what its attention gave."""
    x = attention.out.forward_add(mixed, x)
    gate, up = mlp.gate_up.forward(layer.mlp_norm.forward(x)).chunk(2, -1)
    return mlp.down.forward_add(F.silu(gate) * up, x)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """[rows, heads * width] of queries [rows, heads, width] over keys and values [slots, kv_heads, width]."""
    if not len(q):
        # PyTorch's kernel divides by the count.
        return q.flatten(1)
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
    return mixed[0].transpose(0, 1).flatten(1)


def causal(text: slice, window: int | None) -> Tensor:
    """Boolean [rows, rows]: each row of a text sees those before it, as far as its window goes."""
    at = torch.arange(text.stop - text.start)
    return _inside(at[:, None] >= at, at, at, window)


def _inside(sees: Tensor, rows: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """What of it lies within a sliding window, by positions."""
    return sees if window is None else sees & (rows[:, None] - slots < window)
