"""Attention is made of parts that merge.

A part is some keys and values the rows attend to; each part gives an output and its log-sum-exp, and an exact
merge joins them. Shared prefixes, split keys, trees and sparse pages are different lists of parts, never
other modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

PER_HEAD_CAUSAL_ROWS = 64
"""From this many rows on, skipping the masked half of a causal part pays for one call per query group."""


@dataclass
class Part:
    """Keys [kv_heads, slots, key_width] and values [kv_heads, slots, value_width] that a span's rows attend to.

    `mask` is additive [rows, slots] (0 or -inf) in the keys' dtype, `"causal"` (as many slots as rows, row i
    sees slots 0..i), or None: every row sees every slot. `blind` marks rows [rows] that see no slot at all.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | Literal["causal"] | None = None
    blind: Tensor | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | Literal['causal'] | None"], tuple[Tensor, Tensor]]
"""(queries [h, rows, d], keys [h, slots, d], values, mask) -> (out [h, rows, d], lse [h, rows], base e)."""


def reference_kernel(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | Literal["causal"] | None
) -> tuple[Tensor, Tensor]:
    """Plain matrix products with scores in float32 (or wider); every other kernel is tested against it."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ keys.to(wide).transpose(-1, -2) / queries.shape[-1] ** 0.5
    if isinstance(mask, str):
        rows = queries.shape[-2]
        scores = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return (weights @ values.to(wide)).to(queries.dtype), lse


def cpu_flash_kernel(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | Literal["causal"] | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel for CPU, which returns the log-sum-exp."""
    if 0 in queries.shape or 0 in keys.shape or keys.shape[-1] != values.shape[-1]:
        # The kernel knows one width, and divides by both counts: the process would die of it.
        return reference_kernel(queries, keys, values, mask)
    causal = isinstance(mask, str)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        0.0,
        causal,
        attn_mask=None if causal else mask,
    )
    return out[0], lse[0]


def kernel_for(device: torch.device) -> Kernel:
    """The fastest tested kernel of a device."""
    return cpu_flash_kernel if device.type == "cpu" else reference_kernel


def attend(queries: Tensor, parts: Sequence[Part], kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Attention of rows over a list of parts.

    Args:
        queries: [rows, heads, key_width], rotated.
        parts: what they see; every row must see at least one slot of some part.
        kernel: computes one part.

    Returns:
        Out [rows, heads, value_width] in the queries' dtype, and lse [rows, heads], base e.
    """
    rows, heads, width = queries.shape
    kv_heads = parts[0].keys.shape[0]
    group = heads // kv_heads
    # Query heads that share a key head become further rows of it, so keys are never repeated in memory.
    grouped = queries.view(rows, kv_heads, group, width).permute(1, 2, 0, 3)
    folded = grouped.reshape(kv_heads, group * rows, width)
    out, lse = _part(grouped, folded, parts[0], kernel)
    for part in parts[1:]:
        other, other_lse = _part(grouped, folded, part, kernel)
        out, lse = merge(out, lse, other, other_lse)
    return out.view(kv_heads, group, rows, -1).permute(2, 0, 1, 3).flatten(1, 2), lse.reshape(heads, rows).T


def _part(grouped: Tensor, folded: Tensor, part: Part, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """One part for all groups: (out [kv_heads, group * rows, value_width], lse [kv_heads, group * rows])."""
    _, group, rows, _ = grouped.shape
    mask = part.mask
    if isinstance(mask, str):
        if rows == 1:
            mask = None
        elif group > 1 and rows >= PER_HEAD_CAUSAL_ROWS:
            pieces = [kernel(grouped[:, g], part.keys, part.values, "causal") for g in range(group)]
            return torch.cat([out for out, _ in pieces], 1), torch.cat([lse for _, lse in pieces], 1)
        elif group > 1:
            mask = _grouped_causal_mask(rows, group, part.keys.dtype, part.keys.device)
    elif mask is not None and group > 1:
        mask = mask.repeat(group, 1)
    out, lse = kernel(folded, part.keys, part.values, mask)
    if part.blind is not None:
        # Kernels disagree about a softmax over nothing; the merge needs weight zero there, and no NaN.
        blind = part.blind.repeat(group)
        lse = lse.masked_fill(blind, -torch.inf)
        out = out.masked_fill(blind.unsqueeze(-1), 0)
    return out, lse


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two parts exactly; lse of -inf means the part saw nothing (both must not be)."""
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, other, share), torch.logaddexp(lse, other_lse)


def causal_mask(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [rows, rows] with -inf above the diagonal."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype, device=device).triu_(1)


@lru_cache(maxsize=256)
def _grouped_causal_mask(rows: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The causal mask for each of `group` query heads, one below the other; every layer of every step wants it."""
    return causal_mask(rows, dtype, device).repeat(group, 1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
