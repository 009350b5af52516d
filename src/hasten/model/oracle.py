"""An analytic distribution in the network's place: decoders can be tested on it exactly, without training.

The oracle uses the real cache: a slot's key is its token and its value its position, so appends, commits,
crops and forks are exercised as they are with a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from hasten.model.config import DiffusionConfig, LayerConfig, ModelConfig
from hasten.model.rows import Rows
from hasten.model.taps import Taps

Law = Callable[[tuple[int, ...]], Tensor]
"""Tokens so far (at least one) to the logits of the next, float32 [vocabulary]."""
CanvasLaw = Callable[[tuple[tuple[int, int], ...], int], Tensor]
"""What a row sees, as (position, token) in order of position, and the position that it predicts, to logits there."""


class OracleModel:
    """Logits from a law over token histories.

    Args:
        law: the distribution.
        vocabulary: number of tokens (below 2^24, so that ids are exact in float32).
        max_positions: context limit.
    """

    def __init__(self, law: Law, vocabulary: int, max_positions: int = 4096) -> None:
        self.law = law
        self.config = ModelConfig(
            architecture="oracle",
            vocab_size=vocabulary,
            hidden_size=1,
            max_positions=max_positions,
            norm_eps=0.0,
            tied_head=True,
            layers=(LayerConfig.attention(heads=1, kv_heads=1, head_dim=1, ffn=0),),
            inverse_frequencies=(),
        )
        self.device = torch.device("cpu")
        self.cache_dtype = torch.float32

    def weight_bytes(self) -> int:
        return 0

    def forward(self, rows: Rows, wanted: Sequence[int] | None = None, taps: Taps | None = None) -> Tensor:
        """See `hasten.model.decoder.Model.forward`; there are no hidden states to tap."""
        chosen = range(len(rows.tokens)) if wanted is None else wanted
        asked = set(chosen)
        laws: dict[int, Tensor] = {}
        positions = rows.positions.tolist()
        for span in rows.spans:
            span.sequence.begin(rows.positions[span.start : span.stop], span.extend)
            own = rows.tokens[span.start : span.stop].float().reshape(1, -1, 1)
            where = rows.positions[span.start : span.stop].float().reshape(1, -1, 1)
            span.sequence.write(0, own, where)
            count = span.stop - span.start
            pending = span.sequence.pending
            causal = torch.ones(count, pending, dtype=torch.bool).tril(pending - count)
            mask = span.dense_mask(pending)
            visible = causal if mask is None else mask
            memory = span.sequence.memory(0)
            assert memory is not None
            slots: list[tuple[int, int]] = []
            opened = [torch.ones(count, sum(length for _, length in memory), dtype=torch.bool), visible]
            for number, (block, length) in enumerate(memory, 1):
                stop = length + (pending if number == len(memory) else 0)
                tokens, places = (each[0, 0, :stop, 0].long().tolist() for each in (block.keys, block.values))
                slots += zip(places, tokens, strict=True)
            for number, row in enumerate(torch.cat(opened, 1).tolist(), span.start):
                if number in asked:
                    laws[number] = self.predict(tuple(sorted(compress(slots, row))), positions[number])
        return torch.stack([laws[row] for row in chosen]).float() if laws else torch.empty(0, self.config.vocab_size)

    def predict(self, seen: tuple[tuple[int, int], ...], position: int) -> Tensor:
        """Logits of a row at a position that sees these (position, token)."""
        return self.law(tuple(token for _, token in seen))


class CanvasOracle(OracleModel):
    """Logits from a law over what is visible of a canvas, masks included.

    Args:
        canvas_law: the distribution.
        vocabulary: number of tokens, the mask included.
        diffusion: attention, alignment, mask.
    """

    def __init__(
        self, canvas_law: CanvasLaw, vocabulary: int, diffusion: DiffusionConfig, max_positions: int = 4096
    ) -> None:
        super().__init__(lambda history: torch.empty(0), vocabulary, max_positions)
        self.canvas_law = canvas_law
        self.config = replace(self.config, diffusion=diffusion)
        self._shift = 1 if diffusion.alignment == "shifted" else 0

    def predict(self, seen: tuple[tuple[int, int], ...], position: int) -> Tensor:
        return self.canvas_law(seen, position + self._shift)
