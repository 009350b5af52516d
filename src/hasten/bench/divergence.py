"""How far a model's predictions are from those of another one: what rounded weights cost in accuracy.

Mean KL(reference || model) in nats, and how often both find the same token the likeliest, over all rows of prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.bench.conversation import encode
from hasten.bench.prompts import load_prompts
from hasten.cache import SequenceCache
from hasten.engine import SamplingParams
from hasten.errors import Notice, UserError
from hasten.llm import LLM
from hasten.model import Decoder, Rows
from hasten.model.layers import GatedMLP

PROMPTS = Path(__file__).with_name("divergence.jsonl")
"""A few short prompts of many kinds, which ship: what is compared where nobody brings prompts of their own."""
ROWS = 128
"""Rows of a pass: as many logits are held at a time, of two models."""

Piece = tuple[int, int, int]
"""A prompt by its number, and the rows of it that a pass reads: from, to."""


@dataclass
class Divergence:
    """What was compared so far.

    Attributes:
        rows: predictions.
        nats: their KL divergences, added up; None where one side tells its likeliest tokens only.
        agreeing: rows whose likeliest token is the same.
    """

    rows: int = 0
    nats: float | None = 0.0
    agreeing: int = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Compare rows.

        Args:
            reference: logits [rows, vocabulary].
            other: the same of the model that is judged, or its likeliest tokens, int64 [rows].
        """
        self.rows += len(reference)
        if other.dim() == 1:
            self.nats = None
            self.agreeing += int((reference.argmax(-1) == other).sum())
            return
        self.agreeing += int((reference.argmax(-1) == other.argmax(-1)).sum())
        if self.nats is not None:
            self.nats += _nats(reference, other)

    def document(self) -> dict[str, Any]:
        """`rows`, `kl` (the mean, in nats; null where it is not known) and `top1`, a share."""
        return {
            "rows": self.rows,
            "kl": None if self.nats is None else round(self.nats / self.rows, 7),
            "top1": round(self.agreeing / self.rows, 5),
        }


def _nats(reference: Tensor, other: Tensor) -> float:
    """KL(reference || other), summed over rows; the sum is taken in float64, as what is small may count."""
    expected, found = (logits.double().log_softmax(-1) for logits in (reference, other))
    share = expected.exp()
    # What is impossible to the reference weighs nothing, whatever the other one thinks.
    terms = torch.where(share > 0, share * (expected - found), 0.0)
    return float(terms.sum())


@torch.inference_mode()
def divergence(
    llm: LLM,
    reference: LLM,
    prompts: Sequence[Sequence[int]],
    report: Callable[[int], None] = lambda rows: None,
) -> Divergence:
    """Compare a model with a reference on every row of some prompts.

    Args:
        prompts: token ids, at least one in each.
        report: is told the rows of each pass.
    """
    found = Divergence()
    own, theirs = _Reader(llm, prompts), _Reader(reference, prompts)
    try:
        for batch in passes([len(prompt) for prompt in prompts], ROWS):
            found.add(theirs.logits(batch), own.logits(batch))
            report(sum(stop - start for _, start, stop in batch))
    finally:
        own.release()
        theirs.release()
    return found


def passes(lengths: Sequence[int], most: int) -> Iterator[list[Piece]]:
    """All rows of prompts in order, in passes of so many; a long prompt is read in pieces, short ones share a pass."""
    batch: list[Piece] = []
    room = most
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            batch.append((number, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


class _Reader:
    """A model that reads prompts, and says what it expects behind each row."""

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.cache, self.prompts = llm.model, llm.engine.cache, prompts
        self.sequences: dict[int, SequenceCache] = {}

    def logits(self, batch: Sequence[Piece]) -> Tensor:
        """[rows, vocabulary] of the next rows of some prompts."""
        self.sequences |= {number: self.cache.sequence() for number, start, _ in batch if start == 0}
        chains = [(self.sequences[number], self.prompts[number][start:stop], start) for number, start, stop in batch]
        logits = self.model.forward(Rows.of_several(chains, self.model.device)).cpu()
        for number, start, stop in batch:
            self.sequences[number].commit(stop - start)
            if stop == len(self.prompts[number]):
                self.sequences.pop(number).release()
        return logits

    def release(self) -> None:
        """Give back what an interruption left."""
        for sequence in self.sequences.values():
            sequence.release()


def rounded(model: Decoder) -> bool:
    """Whether weights have fewer than sixteen bits: rounded as they were loaded, or by the file that stores them."""
    linears = [model.head, *(layer.mlp.down for layer in model.layers if isinstance(layer.mlp, GatedMLP))]
    return any(linear.nbytes() < 2 * linear.out_features * linear.in_features for linear in linears)


def examine(
    llm: LLM, expanded: Callable[[], LLM], prompts: Path | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """What `hasten doctor` says of a model's weights: `Divergence.document`, with the `reference` and the `prompts`.

    Args:
        expanded: loads the same model in float32.
        prompts: a file; by default those that ship. Of conversations the first turns are read.
        report: is told how far it is.

    Raises:
        UserError: no such file; a prompt that is longer than the context.
    """
    chosen = [prompt for prompt in load_prompts(prompts or PROMPTS) if prompt.opens]
    ids = encode(llm, chosen, SamplingParams())
    longest = max(map(len, ids))
    if longest > llm.model.config.max_positions:
        raise UserError(
            f"a prompt of {prompts} has {longest} tokens; the model has a context of {llm.model.config.max_positions}"
        )
    report("loading the model in float32")
    with warnings.catch_warnings():
        # That it is expanded is what is asked for.
        warnings.simplefilter("ignore", Notice)
        reference = expanded()
    total, done = sum(map(len, ids)), 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        report(f"comparing predictions with float32: {done} of {total}")

    found = divergence(llm, reference, ids, advance)
    return {"reference": "float32", "prompts": len(ids), **found.document()}
