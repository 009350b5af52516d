"""A gate in front of feed-forward layers: rows pass by those that would hardly turn them. Attention sees every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.model.decoder import Decoder
from hasten.model.rows import Rows


@dataclass(frozen=True)
class Gate:
    """Of the layers `first` to `last`, a row passes by so many (`run`) behind one that was as good as nothing to it.

    That is one whose result, added to the residual stream, has at least this cosine (`threshold`) with the stream
    before it. The next layer that the row goes through is a test again.

    Attributes:
        channels: float32 [hidden], weights of the channels in the cosine.
    """

    first: int
    last: int
    run: int
    threshold: float
    channels: Tensor


@torch.inference_mode()
def compose_gated(
    model: Decoder, rows: Rows, wanted: Sequence[int] | None, gate: Gate, may: Tensor
) -> tuple[Tensor, Tensor]:
    """A pass of rows of which some (`may`, boolean [rows]) pass by layers; the others go through all.

    From the model's pieces; only rows that go through a layer are computed there.

    Returns:
        Float32 logits [wanted rows, vocabulary], and which layers each row passed by: boolean [layers, rows].
    """
    step, x = model.start(rows), model.embed(rows)
    skipped = torch.zeros(len(model.layers), len(may), dtype=torch.bool, device=model.device)
    left, may = torch.zeros(len(may), dtype=torch.int64, device=model.device), may.to(model.device)
    channels = gate.channels.to(model.device)
    for number, layer in enumerate(model.layers):
        x = layer.mix(x, step)
        if not gate.first <= number <= gate.last:
            x = layer.feed(x, step)
            continue
        skipped[number] = left > 0
        left -= skipped[number].to(left.dtype)
        through = ~skipped[number]
        if not through.any():
            continue
        before = x[through]
        after = layer.feed(before, step)
        alike = cosine(before, after, channels) >= gate.threshold
        left[through] = torch.where(alike & may[through], gate.run, 0)
        x = x.masked_scatter(through.unsqueeze(1), after)
    return model.logits(x, wanted), skipped


def cosine(one: Tensor, other: Tensor, channels: Tensor) -> Tensor:
    """Of rows [..., hidden] of the residual stream, in float32 with weighed channels: [...]."""
    one, other = one.float(), other.float()
    product = (one * other * channels).sum(-1)
    return product / ((one * one * channels).sum(-1) * (other * other * channels).sum(-1)).sqrt()
