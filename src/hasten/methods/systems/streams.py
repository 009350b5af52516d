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
        states: [wanted rows, streams, hidden], what the head reads of the streams behind each.
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

    def forward(self, model: Decoder, rows: Rows, wanted: Sequence[int]) -> Said:
        """The pass over some rows, with streams behind those whose logits are wanted; these leave nothing pending.

        Args:
            wanted: numbers of rows, ascending.
        """
        beside, heard, taken = self._beside(rows, wanted)
        taps = Taps((FINAL,))
        logits = model.forward(beside, heard, taps)
        for span, own in zip(rows.spans, beside.spans, strict=True):
            cast(SequenceCache, span.sequence).withdraw((own.stop - own.start) - (span.stop - span.start))
        states = taps[FINAL][torch.tensor(taken, device=model.device)]
        return Said(logits, states.view(len(wanted), len(self), -1))

    def logits(self, model: Decoder, states: Tensor) -> Tensor:
        """Float32 [places, streams, vocabulary] of some states [places, streams, hidden]."""
        return logits_of(model.head, states.flatten(0, 1)).float().view(*states.shape[:2], -1)

    def _beside(self, rows: Rows, wanted: Sequence[int]) -> tuple[Rows, list[int], list[int]]:
        """The rows, those of each sequence with its streams behind them; which are wanted of them, and the streams'."""
        join, ahead = Join(self.layer, vectors=self.vectors), torch.arange(1, len(self) + 1, device=rows.tokens.device)
        tokens: list[Tensor] = []
        positions: list[Tensor] = []
        spans: list[Span] = []
        joins: list[tuple[int, int, Join]] = []
        start = 0
        for span in rows.spans:
            asked = [row - span.start for row in wanted if span.start <= row < span.stop]
            mine, count = slice(span.start, span.stop), span.stop - span.start
            places = rows.positions[mine]
            # As what a row below its layer enters is nothing to it.
            tokens += [rows.tokens[mine], rows.tokens.new_zeros(len(asked) * len(self))]
            positions += [places, (places[asked, None] + ahead).flatten()]
            first, stop = start + count, start + count + len(asked) * len(self)
            joins += [(first + place * len(self), start + row, join) for place, row in enumerate(asked)]
            mask = self._mask(span, asked) if asked else span.mask
            spans.append(Span(span.sequence, start, stop, mask, span.extend))
            start = stop
        taken = [first + number for first, _, _ in joins for number in range(len(self))]
        heard = [source for _, source, _ in joins]
        return Rows(torch.cat(tokens), torch.cat(positions), spans, joins=joins), heard, taken

    def _mask(self, span: Span, asked: Sequence[int]) -> Tensor:
        """Boolean [rows, pending]: a stream sees what its row does, and those before it in its place."""
        count, device = span.stop - span.start, self.vectors.device
        before = span.sequence.pending if span.extend else 0
        mask = span.mask
        if mask is None:
            mask = torch.ones(count, before + count, dtype=torch.bool, device=device).tril(before)
        assert not isinstance(mask, str)
        # Streams of one row only see each other.
        number = torch.arange(len(asked) * len(self), device=device)
        same, earlier = (number[:, None] // len(self) == number // len(self)), number[:, None] >= number
        streams = torch.cat([mask[asked].repeat_interleave(len(self), 0), same & earlier], 1)
        return torch.cat([torch.cat([mask, mask.new_zeros(count, len(number))], 1), streams])
