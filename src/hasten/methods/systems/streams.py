"""A drafter of several streams: rows behind its tokens that say, in the same pass, what comes after the next one.

"Speculative Streaming: Fast LLM Inference without Auxiliary Models", 2024, arXiv 2402.11131, as Mirror-SD (2510.13161)
has it for its drafter: at the input of a layer, stream j begins as the state of a token (the *main stream*) with a
learned vector added, j places behind it. Above, it sees the text up to its token and the streams before it in the same
place; norm and head are the drafter's own. Nothing of the main stream sees it, so that what the drafter says of the
next token is the same with streams and without. `hasten train align --streams` makes them.

What streams say is not drafted: it is read in the next pass, behind the token that the main stream has said by then,
and kept as far as the main stream says the same. So a pass gives a token, and one more for each guess that was right.

Format: `streams.safetensors` beside the drafter's weights, which are those of any model: `vectors` [streams, hidden]
and `layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.cache import SequenceCache
from hasten.errors import UserError
from hasten.files import replacing
from hasten.methods.heads.files import read_tensors, require_names, require_shape
from hasten.methods.heads.head import FINAL, logits_of
from hasten.model import Decoder, Join, Rows, Span, Taps

FILE, VECTORS, LAYER = "streams.safetensors", "vectors", "layer"
MOST = 8
"""Streams of a drafter."""


class Said(NamedTuple):
    """What a pass with streams gives.

    Attributes:
        logits: float32 [wanted rows, vocabulary], of the main stream.
        states: [asked rows, streams, hidden], what the head reads of the streams behind each.
    """

    logits: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class Streams:
    """What was trained.

    Attributes:
        vectors: float32 [streams, hidden], contiguous.
        layer: at whose input they enter.
    """

    vectors: Tensor
    layer: int

    @classmethod
    def load(cls, folder: Path, model: Decoder) -> Self | None:
        """Those of a drafter; None where it has none.

        Args:
            folder: of the drafter, or its one file.

        Raises:
            UserError: damaged ones, or some for another drafter.
        """
        file, depth = folder / FILE, len(model.layers)
        if not file.exists():
            return None
        tensors = read_tensors(file)
        require_names(file, tensors, (VECTORS, LAYER))
        vectors = tensors[VECTORS]
        require_shape(file, VECTORS, vectors, len(vectors) if vectors.ndim else 0, model.config.hidden_size)
        require_shape(file, LAYER, tensors[LAYER])
        layer = int(tensors[LAYER])
        if not 1 <= len(vectors) <= MOST:
            raise UserError(f"{file} must have 1 to {MOST} streams, not {len(vectors)}")
        if not 0 <= layer < depth:
            raise UserError(f"{file}: layer must be one of the drafter's, 0 to {depth - 1}, not {layer}")
        return cls(vectors.float().to(model.device).contiguous(), layer)

    def save(self, folder: Path) -> None:
        """Write them beside a drafter.

        Raises:
            UserError: they cannot be written.
        """
        with replacing(folder / FILE) as fresh:
            save_file({VECTORS: self.vectors.float().contiguous(), LAYER: torch.tensor(self.layer)}, fresh)

    def __len__(self) -> int:
        return len(self.vectors)

    def first(self, count: int) -> Streams | None:
        """So many of them at most; None for none."""
        return Streams(self.vectors[:count], self.layer) if count else None

    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int], asked: Sequence[int]) -> Said:
        """The pass over some rows, with streams behind some of these, which leave nothing pending.

        Args:
            wanted: numbers of the rows whose logits are wanted.
            asked: numbers of the rows that have streams, ascending.
        """
        beside, number = self._beside(rows, asked)
        taps = Taps((FINAL,))
        logits = model.forward(beside, [number[row] for row in wanted], taps)
        for span, own in zip(rows.spans, beside.spans, strict=True):
            cast(SequenceCache, span.sequence).withdraw((own.stop - own.start) - (span.stop - span.start))
        taken = [first + stream for first, _, _ in beside.joins for stream in range(len(self))]
        states = taps[FINAL][torch.tensor(taken, device=model.device)]
        return Said(logits, states.view(len(asked), len(self), -1))

    def logits(self, model: Decoder, states: Tensor) -> Tensor:
        """Float32 [places, streams, vocabulary] of some states [places, streams, hidden]."""
        return logits_of(model.head, states.flatten(0, 1)).float().view(*states.shape[:2], -1)

    def _beside(self, rows: Rows, asked: Sequence[int]) -> tuple[Rows, list[int]]:
        """The rows, those of each sequence with its streams behind them, and the new number of each one."""
        join, device = Join(self.layer, vectors=self.vectors), rows.tokens.device
        before, places = rows.tokens.tolist(), rows.positions.tolist()
        tokens: list[int] = []
        positions: list[int] = []
        number: list[int] = []
        spans: list[Span] = []
        joins: list[tuple[int, int, Join]] = []
        for span in rows.spans:
            start = len(tokens)
            number += range(start, start + span.stop - span.start)
            tokens += before[span.start : span.stop]
            positions += places[span.start : span.stop]
            own = [row for row in asked if span.start <= row < span.stop]
            for row in own:
                joins.append((len(tokens), number[row], join))
                # As what a row below its layer enters is nothing to it.
                tokens += [0] * len(self)
                positions += range(places[row] + 1, places[row] + 1 + len(self))
            mask = self._mask(span, [row - span.start for row in own]) if own else span.mask
            spans.append(Span(span.sequence, start, len(tokens), mask, span.extend))
        numbers = torch.tensor([tokens, positions], device=device)
        return Rows(numbers[0], numbers[1], spans, joins=joins), number

    def _mask(self, span: Span, asked: Sequence[int]) -> Tensor:
        """Boolean [rows, pending]: a stream sees what its row does, and those before it in its place."""
        count, before = span.stop - span.start, span.sequence.pending if span.extend else 0
        visible = before + count
        sees = np.zeros((count + len(asked) * len(self), visible + len(asked) * len(self)), dtype=bool)
        if span.mask is None:
            sees[:count, :visible] = np.tri(count, visible, before, dtype=bool)
        else:
            assert not isinstance(span.mask, str)
            sees[:count, :visible] = span.mask.numpy(force=True)
        own = np.tri(len(self), dtype=bool)
        for place, row in enumerate(asked):
            start, stop = place * len(self), (place + 1) * len(self)
            sees[count + start : count + stop, :visible] = sees[row, :visible]
            sees[count + start : count + stop, visible + start : visible + stop] = own
        return torch.from_numpy(sees).to(self.vectors.device)
