"""dParallel's recipe (arXiv 2509.26488): certainty-forcing distillation of a model on what it has itself written.

The teacher answers questions one token per pass, block after block, and its right answers are kept. The student begins
as the teacher and learns to say the same while it is sure of many tokens at once. The paper trains low-rank adapters;
here all weights are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.errors import UserError, require
from hasten.llm import LLM
from hasten.model.checkpoint import resolve
from hasten.model.loading import read_config
from hasten.tasks import Example
from hasten.train.answers import FILE, gather, read_answers, right_answers
from hasten.train.data import IGNORE, Batch, Passes, training_examples
from hasten.train.diffusion.adapt import Adaptation, BlockAdaptation, Text
from hasten.train.diffusion.corruption import draw_block, two_views
from hasten.train.diffusion.fast_dllm_v2 import ComplementaryBlocks
from hasten.train.diffusion.layout import load, save_llada
from hasten.train.diffusion.losses import certainty
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.diffusion.mdm import MaskedDiffusion
from hasten.train.diffusion.nbdiff import NextBlock
from hasten.train.diffusion.tidar import DraftAndVerify
from hasten.train.tokenizer import load_tokenizer

KINDS: dict[tuple[str, str], type[MaskedDiffusion] | type[BlockAdaptation]] = {
    ("full", "same"): MaskedDiffusion,
    ("block-causal", "shifted"): ComplementaryBlocks,
    ("context-causal", "shifted"): NextBlock,
    ("context-causal", "same"): DraftAndVerify,
}
"""The recipes by attention and alignment of the models they make."""


@dataclass(frozen=True)
class Distillation(Adaptation):
    """The teacher is `parent`, which answers `prompts` questions; the student is a copy of it.

    `block` is that of decoding, for a teacher whose positions all see each other; others have their own. `beta` weighs
    the entropy, which is that of the distribution at `temperature`.

    Raises:
        UserError: out of range, or the teacher is no model that fills masks, or of a kind that has no recipe.
    """

    parent: str = "tiny-block"
    tokens: int = 1_000_000
    lr: float = 5e-5
    block: int = 32
    prompts: int = 3_000
    beta: float = 2.0
    temperature: float = 0.5

    source: ClassVar[str] = "that model's own\nright answers to hasten's procedural tasks"
    compared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.prompts >= 1 and self.block >= 1, "prompts and block must be at least 1"),
            (self.beta >= 0 and self.temperature > 0, "beta must be 0 or more, temperature above 0"),
        )
        require(checks, "dparallel")
        _ = self.kind

    @cached_property
    def kind(self) -> MaskedDiffusion | BlockAdaptation:
        """The recipe of models like the teacher, which knows how they predict."""
        diffusion = read_config(resolve(self.parent)).diffusion
        if diffusion is None:
            raise UserError(
                f"dparallel distils a model that fills masked positions, and {self.parent} is none: "
                "`hasten train mdm` or `hasten train nbdiff` makes one of it"
            )
        recipe = KINDS.get((diffusion.attention, diffusion.alignment))
        if recipe is None:
            raise UserError(
                f"{self.parent} has {diffusion.attention} attention and {diffusion.alignment} alignment: "
                "there is no training for such models"
            )
        common = {field.name: getattr(self, field.name) for field in fields(Adaptation)}
        if issubclass(recipe, BlockAdaptation):
            common["block"] = diffusion.block
        return recipe(**common)

    @property
    def attention(self) -> str:
        return self.kind.attention

    @property
    def alignment(self) -> str:
        return self.kind.alignment

    @property
    def origin(self) -> dict[str, Any]:
        """What the answers depend on."""
        return {
            "model": self.parent, "block": self.block, "context": self.context, "answers": self.answers,
            "seed": self.seed,
        }  # fmt: skip

    def answered(self, folder: Path) -> list[dict[str, Any]]:
        """The teacher's answers so far, right or wrong."""
        return read_answers(folder / FILE, self.origin)[: self.prompts]

    @property
    def method(self) -> str:
        """How the teacher decodes: one token per pass, the surest first."""
        return "denoise" + self._options

    @property
    def _options(self) -> str:
        """Of the decoders, where the model has no block of its own."""
        return f":block={self.block}" if self.attention == "full" else ""

    @property
    def decoders(self) -> tuple[str, ...]:
        autoregressive = ("plain",) if self.attention == "context-causal" else ()
        return (*autoregressive, self.method, "dparallel" + self._options)

    def section(self, mask_id: int) -> dict[str, Any]:
        return self.kind.section(mask_id)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The teacher's."""
        return load_tokenizer(resolve(self.parent))

    def build(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """The teacher in float32."""
        return load(resolve(self.parent))

    def ask(self, teacher: LLM, folder: Path, report: Callable[[int], None] = lambda done: None) -> dict[str, int]:
        """Have the teacher answer the questions, into a file of the run's folder; those there are not asked again.

        Args:
            teacher: `parent`, loaded.
            folder: of the run.
            report: told how many were answered.

        Returns:
            how many were `asked`, and how many answers are `right`.

        Raises:
            UserError: the file was made by another run, or is damaged.
        """
        room = min(self.context, teacher.model.config.max_positions)

        def fits(question: Example) -> bool:
            answer = len(teacher.encode(question.answer))
            return answer <= (self.answers or answer) and len(teacher.encode(question.prompt)) + answer < room

        questions = training_examples(self.prompts, self.seed, fits=fits)
        gather(teacher, questions, self.method, folder / FILE, self.origin, report)
        answered = self.answered(folder)
        return {"asked": len(answered), "right": len(right_answers(answered))}

    def stream(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Passes:
        """The teacher's right answers, again and again.

        Raises:
            UserError: there are none.
        """
        answered = self.answered(folder)
        documents = right_answers(answered)
        if not documents:
            raise UserError(
                f"{self.parent} answered none of {len(answered)} questions right: there is nothing to learn from"
            )
        return Passes(documents, tokenizer.eos_token_id, self.batch_tokens, self.seed)

    def loss(self, model: LlamaForCausalLM, batch: Batch, progress: float, generator: torch.Generator) -> Tensor:
        """See `certainty_loss`."""
        text = self.canvas(model, batch, generator)
        return certainty_loss(self.kind, model, text, self.blocks(text), self.beta, self.temperature, generator)

    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        return self.kind.predict(model, text, hidden, wanted)

    def canvas(self, model: LlamaForCausalLM, batch: Batch, generator: torch.Generator) -> Text:
        return self.kind.canvas(model, batch, generator)

    def blocks(self, text: Text) -> Tensor:
        """Number of each position's block [rows, length], as a decoder counts them."""
        if isinstance(self.kind, BlockAdaptation):
            return self.kind.blocks(text)
        return answer_blocks(text.start, text.ids.shape[1], self.block, torch.zeros_like(text.start))

    def export(self, model: LlamaForCausalLM, folder: Path) -> None:
        """Write the model in the teacher's layout."""
        if read_config(resolve(self.parent)).architecture == "llada":
            save_llada(model, folder)
        else:
            super().export(model, folder)


def certainty_loss(
    recipe: Adaptation,
    model: LlamaForCausalLM,
    text: Text,
    blocks: Tensor,
    beta: float,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """The loss of two views of one block per text, whose later blocks are hidden and whose earlier ones are not.

    Each position of the block is predicted in one of the views. Where the pass over finished blocks also predicts the
    first token of the next one, no decoder looks at a block without that, and so neither view hides it from the others.

    Args:
        recipe: how the model predicts; that of its own training.
        model: under distillation.
        text: prompts and the model's own answers.
        blocks: number of each position's block [rows, length].
        beta: weight of the entropy.
        temperature: of the distribution whose entropy it is.
        generator: of the noise.
    """
    segment, later = draw_block(text.answer, (text.labels != IGNORE).sum(1), blocks, generator)
    known = torch.zeros_like(segment)
    if isinstance(recipe, BlockAdaptation) and recipe.alignment == "shifted":
        known[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    loss = torch.zeros(())
    for view in two_views(segment, generator):
        hidden = (view & ~known) | later
        loss = loss + certainty(recipe.predict(model, text, hidden, view), text.ids[view], beta, temperature)
    return loss
