"""Adaptation of a model to filling masks: what the recipes share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.errors import UserError
from hasten.model.checkpoint import resolve
from hasten.train.card import SOURCE
from hasten.train.data import DEFAULT_WEIGHTS, IGNORE, Batch
from hasten.train.diffusion.layout import load
from hasten.train.diffusion.masks import answer_blocks
from hasten.train.recipe import Recipe
from hasten.train.tokenizer import load_tokenizer, with_mask

WEIGHTS = {**DEFAULT_WEIGHTS, "edit": 0.5, "lookup": 0.5, "shuffle": 0.1, "json": 0.8, "needle": 0.7, "sql": 0.8}
"""Less of what takes long texts or what no small model learns, in a run that is short."""


@dataclass(frozen=True)
class Adaptation(Recipe):
    """A run that begins with the weights of `parent`: a folder or a shipped model, of Llama's or LLaDA's layout.

    The card says that it was adapted on its `source`, and, if `compared`, what the parent does in the same way.
    """

    context: int = 512
    tokens: int = 6_000_000
    opening: float = 0.0
    curriculum: float = 0.5
    answers: int = 128
    parent: str = "tiny"

    weights: ClassVar[dict[str, float]] = WEIGHTS
    source: ClassVar[str] = SOURCE
    compared: ClassVar[bool] = False

    @property
    @abstractmethod
    def attention(self) -> str:
        """As in `hasten.model.DiffusionConfig`."""

    @property
    @abstractmethod
    def alignment(self) -> str:
        """As in `hasten.model.DiffusionConfig`."""

    @property
    @abstractmethod
    def decoders(self) -> tuple[str, ...]:
        """How the model is decoded to be scored."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return with_mask(load_tokenizer(resolve(self.parent)))

    def build(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """The parent in float32; where it has no mask token, that begins as the mean of all embeddings."""
        model = load(resolve(self.parent))
        new = tokenizer.mask_token_id
        if model.config.vocab_size <= new:
            mean = model.model.embed_tokens.weight.mean(0)
            model.resize_token_embeddings(new + 1, mean_resizing=False)
            with torch.no_grad():
                for layer in (model.model.embed_tokens, model.lm_head):
                    layer.weight[new] = mean
        model.config.diffusion = self.section(new)
        return model

    def section(self, mask_id: int) -> dict[str, Any]:
        """How the model fills masks, for config.json."""
        return {"attention": self.attention, "alignment": self.alignment, "mask_token_id": mask_id}

    @abstractmethod
    def predict(self, model: LlamaForCausalLM, text: Text, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Logits [wanted positions, vocabulary], in row-major order, where the positions `hidden` are masks.

        Both are boolean [rows, length], and what is wanted is hidden.
        """

    @abstractmethod
    def canvas(self, model: LlamaForCausalLM, batch: Batch, generator: torch.Generator) -> Text:
        """The batch, padded as far as a decoder's canvas might reach."""


@dataclass(frozen=True)
class BlockAdaptation(Adaptation):
    """Blocks of `block` tokens are filled one after the other, each behind finished ones.

    Raises:
        UserError: blocks of one token.
    """

    lr: float = 1e-3
    block: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise UserError("block must be at least 2")

    def section(self, mask_id: int) -> dict[str, Any]:
        return {**super().section(mask_id), "block_length": self.block}

    def blocks(self, text: Text) -> Tensor:
        """Number of each position's block [rows, length], as a decoder counts them: from the start of the answer."""
        return answer_blocks(text.start, text.ids.shape[1], self.block, torch.zeros_like(text.start))

    def canvas(self, model: LlamaForCausalLM, batch: Batch, generator: torch.Generator) -> Text:
        """Room for a whole block behind the longest text."""
        return Text.of(batch, batch.ids.shape[1] + self.block, end_id(model))


@dataclass(frozen=True)
class Text:
    """A batch, padded with the end token, and what of it is for the model to write.

    `ids` [rows, length]; `answer` [rows, length] marks what may be hidden, a run to the end of the row that begins at
    `start` [rows]; `labels` as in `Batch`. Padding behind a text that has ended counts as its answer; a text that was
    cut off has no end to predict.
    """

    ids: Tensor
    labels: Tensor
    answer: Tensor
    start: Tensor

    @classmethod
    def of(cls, batch: Batch, length: int, end: int) -> Text:
        """The batch with its rows padded to `length`."""
        missing = length - batch.ids.shape[1]
        ids = F.pad(batch.ids, (0, missing), value=end)
        labels = F.pad(batch.labels, (0, missing), value=IGNORE)
        labelled = labels != IGNORE
        last = length - 1 - labelled.flip(1).long().argmax(1, keepdim=True)
        padding = (ids.gather(1, last) == end) & (torch.arange(length) > last)
        return cls(ids, labels, labelled | padding, labelled.long().argmax(1))


def mask_id(model: LlamaForCausalLM) -> int:
    """The mask token of a model under adaptation."""
    return int(model.config.diffusion["mask_token_id"])


def end_id(model: LlamaForCausalLM) -> int:
    """The token that ends a text, of a model under adaptation."""
    end = model.config.eos_token_id
    assert isinstance(end, int)
    return end


def ceil_to(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple
