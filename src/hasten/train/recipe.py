"""What a training run needs to know: how long, how fast, on what, and which loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.errors import UserError, require_finite
from hasten.train.data import DEFAULT_WEIGHTS, Batch, Mixture, Stream
from hasten.train.tokenizer import load_tokenizer

LEAST_CONTEXT = 64
"""Below, the shortest examples of the tasks would not fit."""
TIMES = "times"
"""Of an optimiser's group that learns at another rate than the run's: so many times as fast."""
SHORT = 0.1
"""Difficulty in the opening."""


class Trained(Protocol):
    """What the trainer asks of a batch: `ids` are the tokens that it is made of."""

    @property
    def ids(self) -> Tensor: ...


Network = TypeVar("Network", bound=torch.nn.Module)
Pools = TypeVar("Pools")
Given = TypeVar("Given", bound=Trained)


@dataclass(frozen=True)
class Schedule(ABC, Generic[Network, Pools, Given]):
    """Everything that defines a run; a resumed run must have the same.

    `tokens` counts padding and prompts. `warmup` and `final_lr` are shares of the run and of `lr`. A step is made of
    `batches_per_step`, which several processes share: however many there are, it is the same run.
    """

    tokens: int = 1_000_000
    batch_tokens: int = 2048
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.02
    final_lr: float = 0.02
    seed: int = 0
    batches_per_step: int = 1

    def __post_init__(self) -> None:
        require_finite(self)
        if self.lr <= 0:
            raise UserError(f"lr must be positive, not {self.lr}")
        if min(self.tokens, self.batch_tokens, self.batches_per_step) < 1:
            raise UserError("tokens, batch-tokens and batches-per-step must be positive")

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Write what the run needs, and a resumed one finds there, into its folder."""

    @abstractmethod
    def begin(self, folder: Path) -> tuple[Network, Pools]:
        """The network as a run begins, and what it is trained on."""

    @abstractmethod
    def optimizers(self, model: Network) -> list[torch.optim.Optimizer]:
        """What updates the network."""

    @abstractmethod
    def pool(self, pools: Pools, number: int, progress: float) -> Sequence[Given]:
        """The batches of a pool: a function of the arguments."""

    @abstractmethod
    def loss(self, model: Network, batch: Given, progress: float, generator: torch.Generator) -> Tensor:
        """The loss of one batch (nats); `progress` runs from 0 to 1, `generator` is the batch's own."""

    @abstractmethod
    def export(self, model: Network, folder: Path) -> None:
        """Write what was trained."""

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up, then a cosine to `final_lr`."""
        if progress < self.warmup:
            return self.lr * max(progress, 1e-4) / self.warmup
        phase = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * phase)))


AnyRecipe = Schedule[Any, Any, Any]


def muon(model: torch.nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Of a whole language model: Muon on the matrices inside the layers, AdamW on the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Recipe(Schedule[LlamaForCausalLM, Stream, Batch]):
    """Training of a whole model, on tasks and prose: Muon on the matrices inside the layers, AdamW on the rest.

    `opening` is the share of the run that has short copying tasks only; `curriculum` the share after which tasks have
    full length. `answers` is the longest answer in tokens, 0 for any.
    """

    context: int = 1024
    tokens: int = 26_000_000
    lr: float = 2.5e-3
    weight_decay: float = 0.05
    opening: float = 0.07
    curriculum: float = 0.65
    answers: int = 0
    precision: str = "bf16"

    weights: ClassVar[dict[str, float]] = DEFAULT_WEIGHTS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision must be bf16 or fp32, not {self.precision!r}")
        if self.context < LEAST_CONTEXT:
            raise UserError(f"context must be at least {LEAST_CONTEXT}, not {self.context}")
        if not (0 <= self.opening <= 1 and 0 <= self.curriculum <= 1):
            raise UserError("opening and curriculum must be between 0 and 1: they are shares of the run")
        if self.answers < 0:
            raise UserError("answers must be 0 (any length) or more")
        if self.batch_tokens < self.context:
            raise UserError(f"batch-tokens ({self.batch_tokens}) must be at least the context ({self.context})")

    @property
    def dtype(self) -> torch.dtype:
        """Of products and activations; weights and their updates are float32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of a run that begins."""

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """The model as the run begins."""

    def prepare(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)

    def begin(self, folder: Path) -> tuple[LlamaForCausalLM, Stream]:
        tokenizer = load_tokenizer(folder)
        return self.build(tokenizer), self.stream(tokenizer, folder)

    def optimizers(self, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
        return muon(model, self.weight_decay)

    def pool(self, pools: Stream, number: int, progress: float) -> list[Batch]:
        return pools.pool(number, self.difficulty(progress), opening=progress < self.opening)

    def export(self, model: LlamaForCausalLM, folder: Path) -> None:
        """Write configuration and weights in bf16, as a Hugging Face folder."""
        model.bfloat16().save_pretrained(folder, max_shard_size="15MB")

    def stream(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Stream:
        """What is trained on; `folder` is the run's own."""
        return Mixture(
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            end=tokenizer.eos_token_id,
            batch_tokens=self.batch_tokens,
            context=self.context,
            seed=self.seed,
            answers=self.answers,
            weights=self.weights,
        )

    def difficulty(self, progress: float) -> float:
        """Length cap of the tasks: short in the opening, then growing linearly to full length."""
        grown = (progress - self.opening) / max(self.curriculum - self.opening, 1e-6)
        return SHORT + (1 - SHORT) * min(1.0, max(0.0, grown))
