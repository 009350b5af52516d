"""A batch as most engines hold it: a rectangle padded on the left, with keys and values [rows, heads, slots, width].

hasten's own engine packs rows without padding, so nothing here serves requests: this is the world in which prepacking
(2404.09529) and batch speculation (2510.22876) are defined, over the same weights and pieces, to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UserError
from hasten.model import Decoder
from hasten.model.layers import Attention, Pass


@dataclass
class PaddedCache:
    """Keys and values of a padded batch.

    Attributes:
        keys, values: per layer [rows, kv_heads, slots, width]; rotated by `positions`.
        content: bool [rows, slots], False for padding: never derived from token ids, which prompts may contain.
        positions: int64 [rows, slots], of each slot's token in its own text.
    """

    keys: list[Tensor]
    values: list[Tensor]
    content: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, model: Decoder, rows: int) -> PaddedCache:
        """Without slots.

        Raises:
            UserError: a layer is no attention with keys and values of its own.
        """
        if not all(isinstance(layer.mixer, Attention) for layer in model.layers):
            raise UserError("a padded batch needs a model whose layers are all attention")
        slots = [layer.slots for layer in model.config.layers]
        dtype, device = model.cache_dtype, model.device
        return cls(
            [torch.empty(rows, each.heads, 0, each.key_width, dtype=dtype, device=device) for each in slots],
            [torch.empty(rows, each.heads, 0, each.value_width, dtype=dtype, device=device) for each in slots],
            torch.empty(rows, 0, dtype=torch.bool, device=model.device),
            torch.empty(rows, 0, dtype=torch.int64, device=model.device),
        )

    @property
    def slots(self) -> int:
        return self.content.shape[1]

    def nbytes(self) -> int:
        return sum(each.nbytes for each in [*self.keys, *self.values])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, with new ones [rows, kv_heads, new slots, width] behind them."""
        self.keys[layer] = torch.cat([self.keys[layer], keys], 2)
        self.values[layer] = torch.cat([self.values[layer], values], 2)
        return self.keys[layer], self.values[layer]

    def aligned(self, pieces: Sequence[tuple[int, int, int]]) -> PaddedCache:
        """A batch of some of its slots: each piece (row, start, stop) becomes a row, padded on the left by zeros."""
        slots = max((stop - start for _, start, stop in pieces), default=0)

        def moved(old: Tensor, axis: int) -> Tensor:
            shape = [len(pieces), *old.shape[1:]]
            shape[axis] = slots
            new = old.new_zeros(shape)
            for number, (row, start, stop) in enumerate(pieces):
                new[number].narrow(axis - 1, slots - (stop - start), stop - start).copy_(
                    old[row].narrow(axis - 1, start, stop - start)
                )
            return new

        return PaddedCache(
            [moved(each, 2) for each in self.keys],
            [moved(each, 2) for each in self.values],
            moved(self.content, 1),
            moved(self.positions, 1),
        )

    def rows(self) -> list[PaddedCache]:
        """Each row by itself, without padding."""
        starts = self.slots - self.content.sum(1)
        return [self.aligned([(row, int(start), self.slots)]) for row, start in enumerate(starts)]

    @classmethod
    def joined(cls, caches: Sequence[PaddedCache]) -> PaddedCache:
        """A batch of single rows; shorter ones are padded on the left."""
        slots = max(cache.slots for cache in caches)

        def all_of(each: Sequence[Tensor], axis: int) -> Tensor:
            padding = [(0, 0) * (tensor.dim() - 1 - axis) + (slots - tensor.shape[axis], 0) for tensor in each]
            return torch.cat([F.pad(tensor, left) for tensor, left in zip(each, padding, strict=True)])

        return cls(
            [all_of(each, 2) for each in zip(*(cache.keys for cache in caches), strict=True)],
            [all_of(each, 2) for each in zip(*(cache.values for cache in caches), strict=True)],
            all_of([cache.content for cache in caches], 1),
            all_of([cache.positions for cache in caches], 1),
        )


def places(content: Tensor) -> Tensor:
    """int64 [rows, slots]: each token's number among those of its row, 0 for padding (2510.22876, section 3)."""
    return (content.cumsum(1) - 1).clamp(min=0)


def left_padded(texts: Sequence[Sequence[int]], model: Decoder) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [rows, longest], and which of them are content; what stands in the padding is not looked at."""
    longest = max(map(len, texts), default=0)
    ids = [[0] * (longest - len(text)) + list(text) for text in texts]
    tokens = torch.tensor(ids, dtype=torch.int64, device=model.device).view(len(texts), longest)
    lengths = torch.tensor([len(text) for text in texts], device=model.device)
    return tokens, torch.arange(longest, device=model.device) >= longest - lengths.unsqueeze(1)


@torch.inference_mode()
def extend(
    model: Decoder,
    cache: PaddedCache,
    tokens: Tensor,
    content: Tensor,
    positions: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """A forward pass over columns behind those in the cache, which keeps them. The model's own pieces compute it.

    Args:
        tokens: int64 [rows, columns].
        content: bool [rows, columns].
        positions: int64 [rows, columns]; by default `places`.
        seen: bool [rows, columns, columns], which new column sees which; by default causal. Padding sees itself, as a
            softmax over nothing would be NaN.

    Returns:
        The residual stream [rows, columns, hidden], for `Decoder.logits`.
    """
    rows, columns = tokens.shape
    cached = cache.slots
    cache.content = torch.cat([cache.content, content], 1)
    if positions is None:
        positions = places(cache.content)[:, cached:]
    cache.positions = torch.cat([cache.positions, positions], 1)
    itself = torch.eye(columns, dtype=torch.bool, device=tokens.device)
    if seen is None:
        seen = torch.ones_like(itself).tril() & content.unsqueeze(1)
    before = cache.content[:, None, :cached].expand(-1, columns, -1)
    visible = torch.cat([before, seen | itself], 2).unsqueeze(1)
    distances = (positions.unsqueeze(2) - cache.positions.unsqueeze(1)).unsqueeze(1)
    step = Pass(positions.flatten(), [], [], model.dtype, model.cache_dtype, None)
    x = F.embedding(tokens.flatten(), model.embedding)
    for layer, config in zip(model.layers, model.config.layers, strict=True):
        mixer = layer.mixer
        assert isinstance(mixer, Attention)
        projected = mixer.project(layer.mixer_norm.forward(x), step.angles(mixer.rotary))
        queries, keys, values = (
            each.view(rows, columns, each.shape[1], -1).transpose(1, 2).to(model.cache_dtype) for each in projected
        )
        keys, values = cache.append(layer.index, keys, values)
        mask = visible if config.window is None else visible & (distances < config.window)
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)
        x = layer.feed(mixer.out.forward_add(mixed.transpose(1, 2).reshape(rows * columns, -1).to(x.dtype), x), step)
    return x.view(rows, columns, -1)
