"""`hasten train align`: a small model that drafts for one target, aligned with the target's own distributions.

"Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs", 2024, arXiv 2403.00858: pre-train,
let the target write, distil with TVD++. Here the target's dialogues serve both: a model without weights begins with
KL on them, as TVD's gradient vanishes where two distributions hardly overlap. The target is not run: its logits are its
head over the final states that are kept of the dialogues.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.errors import UserError
from hasten.methods.drafters.words import TOKEN_MAP, VOCABULARY
from hasten.model import Decoder, load_model
from hasten.model.checkpoint import read_json, resolve
from hasten.model.tokenizer import same_vocabulary, vocabulary_digest
from hasten.train.drafters.losses import LOSSES, Loss, overlap
from hasten.train.drafters.network import DrafterNetwork, from_nothing, small_config
from hasten.train.heads.recipe import Dialogues, Epoch, HeadBatch, HeadRecipe
from hasten.train.recipe import muon
from hasten.train.tokenizer import load_tokenizer

WARMING = "kl"
"""The loss of a model that begins without weights, for a while."""
ALIKE = 16
"""Batches whose dialogues are sorted by length together, which leaves little padding."""
MEASURED_ROWS = 512
"""Held-out rows whose whole distributions are held at once."""


@dataclass(frozen=True)
class Measured:
    """What one exit of a drafter is worth on the dialogues that were held out, row by row.

    Attributes:
        overlap: float32 [rows], sum min(p, q): the probability that a sampled draft is accepted.
        agrees: bool [rows]: whether both find the same token likeliest.
        confidence: float32 [rows]: what the drafter gives its likeliest token.
    """

    overlap: Tensor
    agrees: Tensor
    confidence: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """The rows of all parts."""
        rows = [(each.overlap, each.agrees, each.confidence) for each in parts]
        return cls(*map(torch.cat, zip(*rows, strict=True)))


def compared(model: DrafterNetwork, target: Decoder, states: Tensor, exits: Sequence[Tensor]) -> list[Measured]:
    """What exits are worth on some rows.

    Args:
        states: float32 [rows, hidden], of the target.
        exits: of each, the drafter's logits [rows, words].
    """
    words = slice(None) if model.words is None else model.words
    found: list[list[Measured]] = [[] for _ in exits]
    for start in range(0, max(1, len(states)), MEASURED_ROWS):
        some = slice(start, start + MEASURED_ROWS)
        q = target.head.forward(states[some]).float().softmax(-1)
        likeliest = model.number_of[q.argmax(-1)]
        for mine, logits in zip(found, exits, strict=True):
            p = logits[some].softmax(-1)
            best = p.max(-1)
            mine.append(Measured(overlap(p, q[:, words][:, : p.shape[1]]), best.indices == likeliest, best.values))
    return list(map(Measured.joined, found))


def worth(measured: Sequence[Measured]) -> dict[str, list[float]]:
    """On the average of all rows, as configurations tell it."""
    return {
        "acceptance": [round(float(each.overlap.mean()), 4) for each in measured],
        "agreement": [round(float(each.agrees.float().mean()), 4) for each in measured],
    }


@dataclass(frozen=True)
class AlignRecipe(HeadRecipe[DrafterNetwork]):
    """Attributes beside those of all runs on dialogues:

    base: a small model to begin with; empty for a new one of the following shape.
    hidden, layers, attention_heads, kv_heads, ffn: of a new model.
    distance: the loss, a name of `LOSSES`.
    opening: share of the run that has the loss `kl`, before.
    precision: of products and activations.
    """

    base: str = ""
    hidden: int = 288
    layers: int = 3
    attention_heads: int = 6
    kv_heads: int = 3
    ffn: int = 768
    distance: str = "tvd++"
    opening: float = 0.5
    precision: str = "bf16"

    states: ClassVar[str] = "final_norm.bin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}, not {self.distance!r}")
        if not 0 <= self.opening <= 1:
            raise UserError(f"opening must be between 0 and 1: it is a share of the run, not {self.opening}")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision must be bf16 or fp32, not {self.precision!r}")
        if min(self.hidden, self.layers, self.attention_heads, self.kv_heads, self.ffn) < 1:
            raise UserError("hidden, layers, heads, kv-heads and ffn must be positive")
        if self.hidden % (2 * self.attention_heads) or self.attention_heads % self.kv_heads:
            raise UserError("hidden must be an even multiple of heads, and heads a multiple of kv-heads")

    @property
    def exits(self) -> tuple[int, ...]:
        """Numbers of layers behind which the model drafts; empty for all of them only."""
        return ()

    def build(self, target: Decoder, dialogues: Dialogues) -> DrafterNetwork:
        vocabulary = target.config.vocab_size
        if self.base:
            model, words = self._given(vocabulary)
        else:
            words = dialogues.words(self.words, vocabulary)
            model = self._fresh(target, words)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self.network(model, words, target.head.dequant().float(), dtype)

    def network(
        self, model: LlamaForCausalLM, words: Tensor | None, head: Tensor, dtype: torch.dtype
    ) -> DrafterNetwork:
        """What is trained; arguments as of `DrafterNetwork`."""
        exits = self.exits or (model.config.num_hidden_layers,)
        return DrafterNetwork(model, words, head, exits, dtype)

    def _fresh(self, target: Decoder, words: Tensor | None) -> LlamaForCausalLM:
        table = target.embedding.float() if words is None else target.embedding[words].float()
        count = len(table) + (words is not None)
        context = target.config.max_positions
        shape = self.hidden, self.layers, self.attention_heads, self.kv_heads, self.ffn
        return from_nothing(small_config(count, *shape, context), table, self.seed)

    def _given(self, vocabulary: int) -> tuple[LlamaForCausalLM, Tensor | None]:
        """The model to begin with, and its words.

        Raises:
            UserError: it is no Llama, or has other tokens than the target.
        """
        folder = resolve(self.base)
        source = read_json(folder / "config.json")
        if source.get("model_type") != "llama":
            raise UserError(f"{folder} is no Llama, which a base must be")
        tokens, tokenizer = source.get(TOKEN_MAP), load_tokenizer(resolve(self.parent))
        if tokens is None:
            same = same_vocabulary(load_tokenizer(folder), tokenizer) and source["vocab_size"] >= vocabulary
        else:
            same = source.get(VOCABULARY) == vocabulary_digest(tokenizer)
        if not same:
            raise UserError(f"{folder} has another tokenizer than {self.parent}")
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, None if tokens is None else torch.tensor(tokens)

    def optimizers(self, model: DrafterNetwork) -> list[torch.optim.Optimizer]:
        return muon(model, self.weight_decay)

    def pool(self, pools: Dialogues, number: int, progress: float) -> Epoch:
        """A pass over the dialogues in which those of like length share a batch."""
        rng, bounds = random.Random((self.seed << 40) + number), pools.states.bounds
        order = list(pools.trained)
        rng.shuffle(order)
        mean = bounds[-1] / len(pools.states)
        window = max(1, round(ALIKE * self.batch_tokens / mean))
        packed: list[list[int]] = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lambda one: bounds[one + 1] - bounds[one])
            packed += pools.packed(alike, self.batch_tokens)
        rng.shuffle(packed)
        return Epoch(pools, packed)

    def loss(self, model: DrafterNetwork, batch: HeadBatch, progress: float, generator: torch.Generator) -> Tensor:
        """Of all exits alike, in rows whose answer is a word: where q over the words is most of q."""
        loss = self.loss_at(progress)
        rows, right = model.rows(batch)
        rows, right = rows[right >= 0], right[right >= 0]
        if not len(rows):
            return sum((0.0 * parameter.sum() for parameter in model.parameters()), torch.zeros(()))
        teacher = model.teacher(batch, rows)
        losses = [loss(mine, teacher, right, generator) for mine in model.logits(batch, rows)]
        return torch.stack(losses).mean()

    def loss_at(self, progress: float) -> Loss:
        """The loss that the run has now."""
        return LOSSES[WARMING if progress < self.opening else self.distance]

    @torch.inference_mode()
    def measure(self, model: DrafterNetwork, target: Decoder, dialogues: Dialogues) -> list[Measured]:
        """Each exit, against the target's whole distribution; and behind them what else the network drafts with."""
        batches = dialogues.batches(dialogues.held_out, self.batch_tokens)
        found = [self.measured(model, target, batch) for batch in batches]
        return [Measured.joined(parts) for parts in zip(*found, strict=True)]

    def measured(self, model: DrafterNetwork, target: Decoder, batch: HeadBatch) -> list[Measured]:
        """The same on one batch."""
        rows, _ = model.rows(batch)
        return compared(model, target, batch.states[rows, 0], list(model.logits(batch, rows)))

    def export(self, model: DrafterNetwork, folder: Path) -> None:
        """Write a folder as transformers does, whose configuration says whose drafter it is, and how good."""
        target, dialogues = load_model(resolve(self.parent), "float32", backend="torch"), self.opened()
        measured = self.measure(model, target, dialogues)
        exits, further = measured[: len(model.exits)], measured[len(model.exits) :]
        said = {
            "alignment": {
                "target": Path(self.parent).name,
                "loss": self.distance,
                "dialogues": len(dialogues.states),
                "held_out": len(dialogues.held_out),
                **worth(exits),
                **({"streams": worth(further)} if further else {}),
            },
            **self.told(model, target, exits),
        }
        tokenizer = load_tokenizer(resolve(self.parent))
        if model.words is None:
            tokenizer.save_pretrained(folder)
            said["eos_token_id"] = tokenizer.eos_token_id
        else:
            said |= {VOCABULARY: vocabulary_digest(tokenizer), TOKEN_MAP: model.words.tolist()}
        model.model.config.update(said)
        model.model.bfloat16().save_pretrained(folder, max_shard_size="15MB")

    def opened(self) -> Dialogues:
        """The dialogues of the run."""
        return Dialogues(Path(self.data), self.states)

    def told(self, model: DrafterNetwork, target: Decoder, measured: Sequence[Measured]) -> dict[str, Any]:
        """What else the configuration says."""
        return {}
