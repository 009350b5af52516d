"""`hasten train align --streams`: a drafter whose upper layers have further rows behind each token.

"Speculative Streaming: Fast LLM Inference without Auxiliary Models", 2024, arXiv 2402.11131, for the drafter of
Mirror-SD (2510.13161): the loss of the next token and those of the tokens behind it, weighted, in one pass. There each
loss is on text. Here a stream is told what the target gave all words in its place, behind the text that came to stand
before it: on the average, what comes there whatever comes between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hasten.errors import UserError
from hasten.methods.systems.streams import MOST, Streams
from hasten.model import Decoder
from hasten.train.drafters.align import AlignRecipe, Measured, compared
from hasten.train.drafters.network import DrafterNetwork
from hasten.train.forward import additive, embedded, layer_output, turned
from hasten.train.heads.recipe import HeadBatch

FURTHER = 0.2
"""What the loss of each further stream counts; the main stream's counts 1, and loses little by that."""


class StreamedNetwork(DrafterNetwork):
    """A small model, and vectors [streams, width] with which streams begin at the input of a layer.

    Args:
        model, words, head, dtype: see `DrafterNetwork`.
        streams: how many.
    """

    def __init__(
        self, model: LlamaForCausalLM, words: Tensor | None, head: Tensor, dtype: torch.dtype, streams: int
    ) -> None:
        depth = model.config.num_hidden_layers
        super().__init__(model, words, head, (depth,), dtype)
        # The upper half: below, all that is computed is the main stream's.
        self.layer = depth // 2
        self.vectors = nn.Parameter(torch.zeros(streams, model.config.hidden_size))

    def ahead(self, batch: HeadBatch) -> list[tuple[Tensor, Tensor]]:
        """Of the main stream and each further one, int64 [n] each: rows behind which it speaks, and rows whose states
        are the target's where that says the same place."""
        main, _ = self.rows(batch)
        behind = [batch.ahead(1 + distance) for distance in range(1, 1 + len(self.vectors))]
        return [(main, main), *((rows, rows + distance) for distance, rows in enumerate(behind, 1))]

    def streams(self, batch: HeadBatch, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits, float32 [n, words], of the main stream behind some rows, and of each further one behind others."""
        ids, place = self.aligned(batch)
        length, count = ids.shape[1], 1 + len(self.vectors)
        layers, model, dtype = list(self.model.model.layers), self.model, self.dtype
        x, angles = embedded(model, ids, None, dtype)
        causal = additive(torch.ones(1, length, length, dtype=torch.bool).tril(), dtype)
        for layer in layers[: self.layer]:
            x = layer_output(model, layer, x, causal, angles)
        # One stream behind the other.
        x = torch.cat([x, *(x + vector for vector in self.vectors.to(dtype))], 1)
        stream, places = torch.arange(count * length) // length, torch.arange(count * length) % length
        angles = turned(model, (stream + places)[None], dtype)
        visible = additive(sight(stream, places)[None], dtype)
        for layer in layers[self.layer :]:
            x = layer_output(model, layer, x, visible, angles)
        for number, own in enumerate(rows):
            yield self.said(x[batch.dialogue[own], place[own] + number * length])


def sight(stream: Tensor, places: Tensor) -> Tensor:
    """Boolean [rows, rows]: which rows see which.

    Args:
        stream, places: int64 [rows], of each row; stream 0 is the main one.
    """
    text = (stream == 0) & (places[:, None] >= places)
    own = (stream > 0) & (places[:, None] == places) & (stream[:, None] >= stream)
    return text | own


@dataclass(frozen=True)
class StreamedRecipe(AlignRecipe):
    """Attributes beside those of an aligned drafter:

    streams: further rows behind each token.
    """

    streams: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.streams <= MOST:
            raise UserError(f"streams must be between 1 and {MOST}, or 0 for none, not {self.streams}")

    def network(
        self, model: LlamaForCausalLM, words: Tensor | None, head: Tensor, dtype: torch.dtype
    ) -> StreamedNetwork:
        return StreamedNetwork(model, words, head, dtype, self.streams)

    def loss(self, model: DrafterNetwork, batch: HeadBatch, progress: float, generator: torch.Generator) -> Tensor:
        """The mean of all streams' losses by their weights, in rows whose answer is a word."""
        assert isinstance(model, StreamedNetwork)
        loss, told = self.loss_at(progress), []
        for rows, later in model.ahead(batch):
            right = model.number_of[batch.ids[later + 1]]
            told.append((rows[right >= 0], later[right >= 0], right[right >= 0]))
        total, weights = torch.zeros(()), 0.0
        logits = model.streams(batch, [rows for rows, _, _ in told])
        for mine, (_, later, right), weight in zip(logits, told, [1.0] + [FURTHER] * self.streams, strict=True):
            # Of no rows there is no mean.
            own = loss(mine, model.teacher(batch, later), right, generator) if len(later) else 0.0 * mine.sum()
            total, weights = total + weight * own, weights + weight
        return total / weights

    def measured(self, model: DrafterNetwork, target: Decoder, batch: HeadBatch) -> list[Measured]:
        assert isinstance(model, StreamedNetwork)
        ahead = model.ahead(batch)
        said = zip(ahead, model.streams(batch, [rows for rows, _ in ahead]), strict=True)
        return [compared(model, target, batch.states[later, 0], [logits])[0] for (_, later), logits in said]

    def export(self, model: DrafterNetwork, folder: Path) -> None:
        assert isinstance(model, StreamedNetwork)
        Streams(model.vectors.detach(), model.layer).save(folder)
        super().export(model, folder)
