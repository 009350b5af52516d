"""Fine-tune a model under SkipDecode's schedules (2307.02628): `hasten train skipdecode`.

The authors fine-tune a model for its task, and the pattern of skipped layers is a property of the model then. Since the
layers of later tokens are some of those of earlier ones, each layer computes a prefix of an answer, so that what is
decoded step by step is one pass here: a layer reads the prompt and its prefix, and leaves the rest as it is.

Decisions where the paper leaves room:

- The schedule is in force while the model is trained. Its share falls from all layers to its own in the first third of
  the run (`ramp`): what is asked of the model at once is little.
- Several shares may be trained together: each batch is computed with one of them.
- Prose has no prompt. A place is drawn up to which it counts as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.errors import UserError
from hasten.methods.skipping.skipdecode import TRAINED, Schedule, SkipDecodeParameters
from hasten.model.checkpoint import resolve
from hasten.train.card import SOURCE, decoded_scores, opening, percent, save_card
from hasten.train.data import IGNORE, Batch
from hasten.train.diffusion.layout import load
from hasten.train.forward import additive, embedded, layer_output, normalised
from hasten.train.lm import next_token_loss
from hasten.train.recipe import Recipe
from hasten.train.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ScheduledTuning(Recipe):
    """A run that begins with the weights of `parent`.

    Attributes:
        parent: folder or name of a Llama.
        shares: of the layers, as of `SkipDecodeParameters`; the first is what the model has by default afterwards.
        warm, length: as of `SkipDecodeParameters`.
        ramp: share of the run in which the schedules fall from all layers to their own.

    Raises:
        UserError: no shares, or some value out of range.
    """

    context: int = 512
    tokens: int = 2_000_000
    lr: float = 1e-3
    opening: float = 0.0
    curriculum: float = 0.0
    parent: str = "tiny"
    shares: list[float] = field(default_factory=lambda: [0.8])
    warm: int = 1
    length: int = 64
    ramp: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares:
            raise UserError("shares must name at least one")
        if self.length < 1 or not 0 <= self.ramp <= 1:
            raise UserError("length must be at least 1, and ramp between 0 and 1")
        _ = self.methods  # values that are out of range are refused here

    @property
    def methods(self) -> list[SkipDecodeParameters]:
        """How the model is to be decoded, share by share.

        Raises:
            UserError: out of range.
        """
        return [SkipDecodeParameters(share=share, warm=self.warm, length=self.length) for share in self.shares]

    @property
    def specifications(self) -> list[str]:
        """The same as methods are named."""
        return [f"skipdecode:share={share:g},warm={self.warm},length={self.length}" for share in self.shares]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(resolve(self.parent))

    def build(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """The parent in float32, and in its configuration what it is decoded with afterwards.

        Raises:
            UserError: it is no Llama, or has fewer layers than a schedule runs.
        """
        model = load(resolve(self.parent))
        if getattr(model.config, "diffusion", None) is not None:
            raise UserError(f"{self.parent} fills masked positions, so it has no schedule of layers by token")
        for each in self.methods:
            each.schedule(len(model.model.layers))
        model.config.skipdecode = {name: getattr(self.methods[0], name) for name in TRAINED}
        return model

    def schedule(self, layers: int, progress: float, number: int) -> Schedule:
        """The one of that number, of a model of so many layers, as far as it has fallen at that progress of the run."""
        wanted, fallen = self.methods[number], min(1.0, progress / self.ramp) if self.ramp else 1.0
        return replace(wanted, share=1 - (1 - wanted.share) * fallen).schedule(layers)

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy over labelled tokens, under one of the schedules."""
        number = int(torch.randint(len(self.shares), (), generator=generator))
        schedule = self.schedule(len(model.model.layers), progress, number)
        starts = answer_starts(batch.labels, generator)
        states = scheduled_states(model, batch.ids, starts, schedule, self.length, self.dtype)
        return next_token_loss(model, states, batch.labels)


def answer_starts(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Where each row's answer begins: at its first labelled token, in a row of nothing else at one that is drawn.

    Args:
        labels: [rows, length], as of `Batch`.
    """
    labelled = labels != IGNORE
    first = labelled.long().argmax(1)
    drawn = torch.rand(len(labels), generator=generator) * labelled.sum(1)
    return torch.where(first == 0, 1 + drawn.long(), first)


def scheduled_states(
    model: LlamaForCausalLM, ids: Tensor, starts: Tensor, schedule: Schedule, length: int, dtype: torch.dtype
) -> Tensor:
    """The normalised output [rows, length, width] of tokens that go through fewer and fewer layers.

    Args:
        ids: [rows, length].
        starts: [rows], the first token of each answer; those before it go through all layers.
        length: tokens of an answer at which the schedule reaches its least.
    """
    width = ids.shape[1]
    mask = additive(torch.ones(1, width, width, dtype=torch.bool).tril(), dtype)
    x, (cos, sin) = embedded(model, ids, None, dtype)
    for layer, count in zip(model.model.layers, prefixes(schedule, width, length), strict=True):
        reach = (starts + count).clamp(max=width)
        most = int(reach.max())
        read = x[:, :most]
        angles = cos[:, :most], sin[:, :most]
        given = layer_output(model, layer, read, mask[:, :most, :most], angles)
        inside = torch.arange(most) < reach.unsqueeze(1)
        x = torch.cat([torch.where(inside.unsqueeze(2), given, read), x[:, most:]], 1)
    return normalised(model, x)


def prefixes(schedule: Schedule, width: int, length: int) -> list[int]:
    """How many of the first `width` tokens of an answer each layer computes: those that do are a prefix."""
    chosen = [schedule.chosen(schedule.count(index, length)) for index in range(width)]
    return [sum(layer in each for each in chosen) for layer in range(schedule.layers)]


def write_card(
    recipe: ScheduledTuning,
    folder: Path,
    summary: dict[str, Any],
    command: str,
    per_task: int,
    report: Callable[[int], None] = lambda done: None,
) -> Path:
    """Score the model in `folder` and its parent by all schedules and by none; write `README.md` and `card.json`.

    Args:
        recipe: it was trained with.
        summary: what training returned.
        command: the command line that made the model.
        per_task: held-out examples of each task.
        report: told after each task that was decoded.
    """
    parent = resolve(recipe.parent)
    methods = ("plain", *recipe.specifications)
    decoded = decoded_scores([(f"{each.name}, ", each, methods) for each in (parent, folder)], per_task, report)
    document = {"command": command, "parent": parent.name, **summary, "decoded": decoded}
    return save_card(folder, document, render(folder.name, document))


def render(name: str, document: dict[str, Any]) -> str:
    """The card as Markdown."""
    what = (
        f"A language model of {document['parameters']:,} parameters, fine-tuned by hasten from `{document['parent']}`\n"
        f"on {SOURCE} to leave out layers as an answer goes on (SkipDecode)."
    )
    lines = [
        *opening(name, document, what),
        "",
        "## What it can do",
        "",
        "Exact answers on held-out examples, greedy, float32, before and after.",
        "",
        "| model, method | right |",
        "|---|---|",
    ]
    for method, scores in document["decoded"].items():
        right, of = (sum(score[key] for score in scores.values()) for key in ("right", "of"))
        lines.append(f"| `{method}` | {percent(right, of)} of {of} |")
    return "\n".join([*lines, ""])
