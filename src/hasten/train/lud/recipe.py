"""LUD's recipe (arXiv 2405.15208): a model goes on with what it said, token by token, and by units from placeholders.

Behind a text's rows stands a group of placeholders per unit, all in one pass: the group sees the text before the unit's
first token, which it has to guess as well, and its own placeholders in their order. The m-th of them says the m-th
token behind the first one. All of them are there where a unit is shorter, too, as they are when the model decodes:
those beyond its end are held to what came with little weight, so that what they say of their certainty means something.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.errors import UserError, require
from hasten.methods.drafters.lud import FILE, MOST, save_placeholder
from hasten.model.checkpoint import resolve
from hasten.model.loading import read_config
from hasten.train.data import IGNORE, Document, group, pad
from hasten.train.diffusion.layout import load
from hasten.train.forward import additive, hidden_states, logits
from hasten.train.heads.dialogues import read_dialogues
from hasten.train.heads.recipe import DIALOGUES, is_held_out
from hasten.train.lud import units
from hasten.train.recipe import Schedule, muon
from hasten.train.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Answer(Document):
    """A dialogue. `sure` is of each token of its answer."""

    sure: tuple[bool, ...]


class UnitBatch(NamedTuple):
    """Dialogues side by side.

    Attributes:
        ids: int64 [rows, length], padded on the right.
        labels: int64 [rows, length]: the tokens of answers, IGNORE elsewhere.
        answers: of the rows.
    """

    ids: Tensor
    labels: Tensor
    answers: list[Answer]

    @classmethod
    def of(cls, answers: list[Answer]) -> UnitBatch:
        """Of some dialogues. Nothing sees what they are padded with."""
        batch = pad(answers, 0)
        return cls(batch.ids, batch.labels, answers)


class Groups(NamedTuple):
    """Placeholders [rows, placeholders], padded on the right with such as count for nothing.

    Attributes:
        number: of the group that each belongs to, from 0 on; -1 for padding.
        first: position of the first token of the group's unit.
        ahead: how far behind that one is the token that it says, from 1 on.
        weight: of its loss.
    """

    number: Tensor
    first: Tensor
    ahead: Tensor
    weight: Tensor


@dataclass(frozen=True)
class LexicalUnits(Schedule[LlamaForCausalLM, list[Answer], UnitBatch]):
    """A run on a folder of dialogues and what the model thought of their tokens.

    Attributes:
        parent: that the run begins with: a folder or a shipped model, of Llama's layout.
        data: the folder.
        placeholders: of a group; a unit has one token more at most.
        alpha: least probability of a token that belongs to the unit of the one before.
        mix: weight of the placeholders' loss beside that of ordinary rows; 0 is ordinary fine-tuning.
        surplus: weight of placeholders beyond their unit's end.
        precision: bf16 or fp32, of the products.

    Raises:
        UserError: out of range, or a parent that is no folder of a Llama.
    """

    parent: str = "tiny"
    data: str = ""
    lr: float = 5e-4
    placeholders: int = 3
    alpha: float = 0.9
    mix: float = 1.0
    surplus: float = 0.1
    precision: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (1 <= self.placeholders <= MOST, f"placeholders must be between 1 and {MOST}"),
            (0 < self.alpha <= 1, "alpha must be above 0 and at most 1"),
            (self.mix >= 0 and 0 <= self.surplus <= 1, "mix must not be negative, surplus between 0 and 1"),
            (self.precision in ("bf16", "fp32"), f"precision must be bf16 or fp32, not {self.precision!r}"),
        )
        require(checks, "lud")
        parent = resolve(self.parent)
        if parent.is_file() or (config := read_config(parent)).architecture != "llama" or config.diffusion is not None:
            raise UserError(f"lud: {self.parent} is no folder of a Llama that reads from left to right")

    @property
    def dtype(self) -> torch.dtype:
        """Of products and activations; weights and their updates are float32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def prepare(self, folder: Path) -> None:
        load_tokenizer(resolve(self.parent)).save_pretrained(folder)

    def begin(self, folder: Path) -> tuple[LlamaForCausalLM, list[Answer]]:
        """The parent in float32 with one more embedding, the placeholder's, which is the mean of all others."""
        model = load(resolve(self.parent))
        table = model.model.embed_tokens.weight
        mean, count = table.mean(0), table.shape[0]
        model.resize_token_embeddings(count + 1, mean_resizing=False)
        with torch.no_grad():
            model.model.embed_tokens.weight[count] = mean
        return model, self.answers()

    def answers(self) -> list[Answer]:
        """All dialogues that are trained on.

        Raises:
            UserError: there are too few, or what the model thought of them is not there.
        """
        folder = Path(self.data)
        confidences = units.kept_confidences(folder / units.FILE)
        dialogues = read_dialogues(folder / DIALOGUES)[: len(confidences)]
        made = [
            Answer(each.ids, len(each.prompt), tuple(value >= self.alpha for value in likely))
            for each, likely in zip(dialogues, confidences, strict=True)
            if not is_held_out(each)
        ]
        if not made:
            raise UserError(f"{folder} has too few dialogues")
        return made

    def optimizers(self, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
        return muon(model, self.weight_decay)

    def pool(self, pools: list[Answer], number: int, progress: float) -> list[UnitBatch]:
        """All dialogues once, in an order of its own."""
        rng = random.Random(f"{self.seed}/{number}")
        answers = rng.sample(pools, len(pools))
        answers.sort(key=lambda each: len(each.ids))
        made = [UnitBatch.of(rows) for rows in group(answers, self.batch_tokens)]
        rng.shuffle(made)
        return made

    def loss(self, model: LlamaForCausalLM, batch: UnitBatch, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy (nats) of answers' tokens, and `mix` times the weighted mean of the placeholders'."""
        groups = self.groups(batch.answers, generator)
        text, asked = self.states(model, batch.ids, groups)
        words = model.config.vocab_size - 1
        labelled = batch.labels[:, 1:] != IGNORE
        own = logits(model, text[:, :-1][labelled])[:, :words]
        loss = F.cross_entropy(own, batch.labels[:, 1:][labelled])
        if not groups.weight.any():
            return loss
        counted = groups.weight > 0
        said = batch.ids.gather(1, (groups.first + groups.ahead).clamp(max=batch.ids.shape[1] - 1))
        each = F.cross_entropy(logits(model, asked[counted])[:, :words], said[counted], reduction="none")
        weights = groups.weight[counted]
        return loss + self.mix * (each * weights).sum() / weights.sum()

    def groups(self, answers: Sequence[Answer], generator: torch.Generator) -> Groups:
        """The placeholders of each dialogue. A decoder may come into a unit anywhere, so the first begins anywhere."""
        firsts = torch.randint(self.placeholders + 1, (len(answers),), generator=generator).tolist()
        rows = [self._row(*each) if self.mix else [] for each in zip(answers, firsts, strict=True)]
        width = max(len(row) for row in rows)
        padded = torch.tensor([row + [(-1, 0, 1, 0.0)] * (width - len(row)) for row in rows]).view(len(rows), width, 4)
        number, first, ahead = padded[:, :, :3].long().unbind(2)
        return Groups(number, first, ahead, padded[:, :, 3])

    def _row(self, answer: Answer, first: int) -> list[tuple[int, int, int, float]]:
        """Of each placeholder of a dialogue: its group, position of the unit, how far ahead, weight."""
        row = []
        for number, unit in enumerate(units.units(answer.sure, self.placeholders + 1, first)):
            for ahead in range(1, min(self.placeholders + 1, len(answer.sure) - unit.start)):
                weight = 1.0 if ahead < len(unit) else self.surplus
                row.append((number, answer.answer + unit.start, ahead, weight))
        return row

    def states(self, model: LlamaForCausalLM, ids: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Final states [rows, length, hidden] of the texts, and [rows, placeholders, hidden] behind them."""
        count, length = ids.shape
        asked = torch.full_like(groups.number, model.config.vocab_size - 1)
        positions = torch.cat([torch.arange(length).expand(count, -1), groups.first + groups.ahead - 1], 1)
        mask = additive(visible(length, groups), self.dtype)
        states = hidden_states(model, torch.cat([ids, asked], 1), mask, positions, self.dtype)
        text, behind = torch.split(states, [length, asked.shape[1]], 1)
        return text, behind

    def export(self, model: LlamaForCausalLM, folder: Path) -> None:
        """Write an ordinary model in bf16, as a Hugging Face folder, and its placeholder beside it."""
        table = model.model.embed_tokens.weight
        save_placeholder(table[-1], self.placeholders, folder / FILE)
        model.resize_token_embeddings(table.shape[0] - 1)
        model.bfloat16().save_pretrained(folder, max_shard_size="15MB")


def visible(length: int, groups: Groups) -> Tensor:
    """Which row sees which, boolean [rows, n, n]: those of a text, causal, and the placeholders behind them.

    A placeholder sees the text before its unit, and those of its group up to itself.
    """
    count, width = groups.number.shape
    text = torch.ones(length, length, dtype=torch.bool).tril().expand(count, -1, -1)
    blind = torch.zeros(count, length, width, dtype=torch.bool)
    before = torch.arange(length) < groups.first[:, :, None]
    own = groups.number[:, :, None] == groups.number[:, None, :]
    order = groups.ahead[:, :, None] >= groups.ahead[:, None, :]
    return torch.cat([torch.cat([text, blind], 2), torch.cat([before, own & order], 2)], 1)
