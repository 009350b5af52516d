"""A small recurrent mixer, and a model with one behind its attention layer: what the engine must be able to undo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hasten.cache import Replay, StatePerRow
from hasten.model import Decoder, State
from hasten.model.layers import Layer, Pass

WIDTH = 12


class Recurrence:
    """Gated linear attention: S <- a S + k v, z <- a z + k, out = q S / (1 + |q z|).

    Args:
        hidden: width of the residual stream.
        replays: makes states again from what the rows fed, instead of keeping one per row.
        seed: of the weights.
    """

    def __init__(self, hidden: int, replays: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3 * WIDTH + 1, hidden, generator=generator) / hidden**0.5
        self.out = torch.randn(hidden, WIDTH, generator=generator) / WIDTH**0.5
        self.replays = replays

    def nbytes(self) -> int:
        return self.weight.nbytes + self.out.nbytes

    @staticmethod
    def update(before: tuple[Tensor, ...] | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        matrix, norm = before or (torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH))
        key, value, gate = inputs
        return gate * matrix + key[:, None] * value, gate * norm + key

    def forward_add(self, x: Tensor, residual: Tensor, layer: int, step: Pass) -> Tensor:
        outs = []
        for span in step.spans:
            sequence = span.sequence
            before, left = sequence.state(layer), sequence.pending_states(layer)
            # Row by row, so that a row is the same beside any others.
            rows = torch.stack([self.weight @ row for row in x[span.start : span.stop]])
            query, key, value, gate = rows.split([WIDTH, WIDTH, WIDTH, 1], 1)
            inputs = (key, value, gate.sigmoid())
            parents, states = span.parents(sequence.pending), []
            earlier = sequence.pending - len(rows)
            for row, parent in enumerate(parents):
                came: Any = before
                if parent >= earlier:
                    came = states[parent - earlier]
                elif parent >= 0:
                    came = left.at(before, parent)  # type: ignore[union-attr]
                states.append(self.update(came, tuple(each[row] for each in inputs)))
                matrix, norm = states[-1]
                outs.append(self.out @ (query[row] @ matrix / (1 + (query[row] @ norm).abs())))
            fresh: Any = StatePerRow(tuple(torch.stack(each) for each in zip(*states, strict=True)))
            if self.replays:
                fresh = Replay(inputs, parents, self.update)
            sequence.leave(layer, fresh if left is None else left.extended(fresh))  # type: ignore[attr-defined]
        return residual + torch.stack(outs)


def hybrid(model: Decoder, replays: bool, seed: int = 0) -> Decoder:
    """The model with a recurrent mixer in its second layer."""
    first, second, *rest = model.layers
    recurrent = Layer(
        1, second.mixer_norm, Recurrence(model.config.hidden_size, replays, seed), second.mlp_norm, second.mlp
    )
    shapes = model.config.layers
    config = replace(
        model.config, layers=(shapes[0], replace(shapes[1], keeps=State(((WIDTH, WIDTH), (WIDTH,)))), *shapes[2:])
    )
    return replace(model, config=config, layers=[first, recurrent, *rest])
