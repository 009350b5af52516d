"""Training of rows that ask a frozen target for what comes: put in at random places of its own answers.

What they are held to is what the target itself says where the tokens are known: each dialogue is read once, and is
teacher and context of all rows beside it. A group of rows behind one place sees no other group.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Generic

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine import SoftRows
from hasten.errors import UserError
from hasten.train.heads.dialogues import Dialogue, read_dialogues
from hasten.train.heads.frozen import Frozen, Inserted
from hasten.train.heads.recipe import DIALOGUES, is_held_out, packed
from hasten.train.recipe import Network, Schedule

RANKS = 10
"""Of each prompt, whose accuracy is measured."""
SPACING = 4
"""Of the places in held-out answers where it is."""


@dataclass(frozen=True)
class TextBatch:
    """Dialogues, one behind the other.

    Attributes:
        ids: int64 [rows].
        bounds: [dialogues + 1].
        prompts: tokens of each one's prompt.
    """

    ids: Tensor
    bounds: list[int]
    prompts: list[int]

    @classmethod
    def of(cls, dialogues: Sequence[Dialogue]) -> TextBatch:
        """Of some dialogues."""
        bounds = [0, *accumulate(len(each.ids) for each in dialogues)]
        ids = torch.tensor([token for each in dialogues for token in each.ids])
        return cls(ids, bounds, [len(each.prompt) for each in dialogues])

    @property
    def lengths(self) -> list[int]:
        """Rows of each dialogue."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    def places(self, ahead: int) -> list[range]:
        """Per dialogue, the rows (counted within it) behind which so many tokens and one more are the model's own."""
        pairs = zip(self.prompts, self.lengths, strict=True)
        return [range(prompt - 1, length - 1 - ahead) for prompt, length in pairs]

    def rows(self, places: Sequence[Sequence[int]]) -> Tensor:
        """int64: numbers of some rows of each dialogue, which are counted within it, in the batch."""
        starts = zip(self.bounds, places, strict=False)
        return torch.tensor([start + place for start, some in starts for place in some], dtype=torch.int64)


class Texts:
    """A folder's dialogues, and which of them are held out."""

    def __init__(self, folder: Path) -> None:
        dialogues = read_dialogues(folder / DIALOGUES)
        self.held_out = [each for each in dialogues if is_held_out(each)]
        self.trained = [each for each in dialogues if not is_held_out(each)]
        if not self.held_out or not self.trained:
            raise UserError(f"{folder} has too few dialogues to train on some and measure on others")


def batches(dialogues: Sequence[Dialogue], rows: int) -> list[TextBatch]:
    """Dialogues in this order, so many rows at a time, but at least one dialogue."""
    groups = packed(range(len(dialogues)), lambda number: len(dialogues[number].ids), rows)
    return [TextBatch.of([dialogues[number] for number in group]) for group in groups]


@dataclass(frozen=True)
class InsertedRecipe(Schedule[Network, Texts, TextBatch], Generic[Network]):
    """A run on a folder of dialogues.

    Attributes:
        parent: the target.
        data: the folder.
        prompts: how many tokens the rows behind a place say, after the next one.
        places: of a dialogue at most.
        decay: the weight of each prompt's loss over that of the one before.
        precision: bf16 or fp32, of the target.
    """

    parent: str = ""
    data: str = ""
    prompts: int = 3
    places: int = 32
    decay: float = 0.8
    precision: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prompts <= 16 or self.places < 1:
            raise UserError("prompts must be between 1 and 16, places positive")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision must be bf16 or fp32, not {self.precision!r}")

    @abstractmethod
    def build(self, target: Frozen, texts: Texts) -> Network:
        """The network as a run begins."""

    @abstractmethod
    def target(self, model: Network) -> Frozen:
        """What it was built for."""

    @abstractmethod
    def insert(self, model: Network, batch: TextBatch, places: Sequence[Sequence[int]]) -> Inserted:
        """The rows of all prompts behind these places of each dialogue, one group behind the other."""

    def prepare(self, folder: Path) -> None:
        """Nothing: the folder of dialogues is there."""

    def begin(self, folder: Path) -> tuple[Network, Texts]:
        torch.manual_seed(self.seed)
        texts = Texts(Path(self.data))
        target = Frozen.load(self.parent, "bfloat16" if self.precision == "bf16" else "float32")
        return self.build(target, texts), texts

    def optimizers(self, model: Network) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=self.weight_decay)]

    def pool(self, pools: Texts, number: int, progress: float) -> list[TextBatch]:
        order = list(pools.trained)
        random.Random((self.seed << 40) + number).shuffle(order)
        return batches(order, self.batch_tokens)

    def loss(self, model: Network, batch: TextBatch, progress: float, generator: torch.Generator) -> Tensor:
        """Kullback-Leibler divergence of each prompt's distribution from the target's, which knows the tokens between.

        From the target's to the prompt's, as the authors' code has it; the paper writes the other direction.
        """
        each = [
            sorted((places.start + torch.randperm(len(places), generator=generator)[: self.places]).tolist())
            for places in batch.places(self.prompts)
        ]
        if not any(each):
            return sum((0.0 * parameter.sum() for parameter in model.parameters()), torch.zeros(()))
        taught, said = self.said(model, batch, each)
        apart = F.kl_div(said.log_softmax(-1), taught.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        weights = self.decay ** torch.arange(self.prompts)
        return (apart.mean(0) * weights).sum() / self.prompts

    def said(self, model: Network, batch: TextBatch, places: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits [places, prompts, vocabulary]: the target's own, and those of the prompts behind the places."""
        target = self.target(model)
        own, asked = target.read(batch.ids, batch.bounds, self.insert(model, batch, places))
        behind = batch.rows(places)[:, None] + torch.arange(1, self.prompts + 1)
        with torch.no_grad():
            taught = target.logits(own[behind])
        # Several rows may stand for one prompt; the mean of what they say is what the head says to their mean.
        return taught, target.logits(asked.view(len(behind), self.prompts, -1, asked.shape[1]).mean(2))

    @torch.no_grad()
    def accuracy(self, model: Network, texts: Texts) -> list[list[float]]:
        """Of each prompt, how often each rank was what the target said next, on the dialogues that were held out."""
        hits, seen = torch.zeros(self.prompts, RANKS), 0
        for batch in batches(texts.held_out, self.batch_tokens):
            places = [list(each[::SPACING]) for each in batch.places(self.prompts)]
            if not any(places):
                continue
            _, said = self.said(model, batch, places)
            came = batch.ids[batch.rows(places)[:, None] + torch.arange(2, self.prompts + 2)]
            best = said.topk(min(RANKS, said.shape[-1]), -1).indices
            hits[:, : best.shape[-1]] += (best == came.unsqueeze(-1)).sum(0)
            seen += len(came)
        shares: list[list[float]] = (hits / max(1, seen)).tolist()
        return [[round(share, 4) for share in ranks] for ranks in shares]


def standing(
    lengths: Sequence[int], places: Sequence[Sequence[int]], soft: SoftRows
) -> tuple[Tensor, list[int], list[Tensor]]:
    """Where groups of rows stand behind places of texts, and what they see: the text up to there, and their own group.

    Args:
        lengths: of the texts.
        places: rows of each, behind which a group stands.
        soft: the rows of a group.

    Returns:
        `positions`, `bounds` and `sees` of `Inserted`.
    """
    ahead, size = torch.tensor(soft.ahead), len(soft)
    positions = [
        torch.tensor(some, dtype=torch.int64).repeat_interleave(size) + ahead.repeat(len(some)) for some in places
    ]
    sees = []
    for length, some in zip(lengths, places, strict=True):
        above = torch.arange(length) <= torch.tensor(some, dtype=torch.int64).repeat_interleave(size)[:, None]
        groups = torch.kron(torch.eye(len(some)), soft.sees.float()).bool()
        sees.append(torch.cat([above, groups], 1))
    return torch.cat(positions), [0, *accumulate(len(each) for each in positions)], sees
