"""Medusa: heads on the target's last hidden state say the tokens behind the next one, all at once.

"Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", 2024, arXiv 2401.10774. Head k reads
the final state at position p and says token p + 1 + k: `W_k (h + SiLU(A_k h + b_k))`. The heads know nothing of each
other's tokens, so a path's probability is the product of its tokens', and the best tree the largest products. `hasten
train medusa` makes the heads. Exactness: lossless, greedy and sampling (deterministic children, one draw of the
target's per node); `acceptance=typical` is the authors' lossy rule.

Decisions where the paper leaves room, or where its code does something else:

- *Tree.* The paper draws one tree up front, from how often each rank of each head was right. By default the heads' own
  probabilities are taken instead, so every step has the tree that is best for it; `tree=static` is the paper's. Which
  part of it is verified follows from what rows cost on this machine.
- *Vocabulary.* Heads may say only the frequent tokens (`token_map`): a full head for each would be larger than a small
  target itself.
- *Heads* run on the one row that was accepted last, not on all rows of the tree.

Formats: vLLM's (`blocks.K.layers.J`, `lm_heads.K`, `token_map`), which is also what is written, and the authors' own
(`K.J.linear`, `K.N`), with or without a matrix of its own per head. A matrix that all heads share is vLLM's
`original_lm_head`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine import Draft, Request, Target, register
from hasten.errors import UserError
from hasten.methods.drafters.drawing import Child
from hasten.methods.heads.files import (
    WEIGHTS,
    read_accuracy,
    read_config,
    read_pieces,
    read_words,
    require_names,
    require_shape,
    save,
)
from hasten.methods.heads.guesses import Guesses
from hasten.methods.heads.head import StateDrafter, linear_of, logits_of, own_head, require_decoder
from hasten.methods.heads.parameters import TreeParameters
from hasten.methods.heads.pieces import with_bias
from hasten.methods.heads.sizing import Sizing
from hasten.methods.heads.tree import best_of_levels, drawn_up, static_paths
from hasten.model import Decoder
from hasten.model.linear import Linear
from hasten.model.weights import Piece

AUTHORS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
"""Files of the authors' format."""
SHARED = "original_lm_head"
"""In vLLM's configuration, whether all heads share the one matrix that is there."""


@dataclass(frozen=True)
class MedusaWeights:
    """Trained heads.

    Attributes:
        blocks: per head, its residual blocks: weights [hidden, hidden] with biases.
        heads: per head [words, hidden]; a single one where all share it, none where all use the target's own.
        words: int64 [words], the token of each row of a head, ascending; None where it is all of the vocabulary.
        accuracy: per head, how often each rank was right on held-out text; empty where nobody measured it.
    """

    blocks: list[list[Piece]]
    heads: list[Piece]
    words: Tensor | None = None
    accuracy: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def load(cls, folder: Path, hidden: int, vocabulary: int) -> Self:
        """Read a folder, whichever format it has.

        Args:
            hidden, vocabulary: of the target.

        Raises:
            UserError: no heads, damaged ones, or some for another target.
        """
        if not folder.is_dir():
            raise UserError(f"medusa: there are no heads in {folder}: `hasten train medusa --model MODEL` makes them")
        config = read_config(folder)
        for name in AUTHORS:
            if (folder / name).exists():
                return cls._authors(folder / name, hidden, vocabulary)
        return cls._vllm(folder / WEIGHTS, config, hidden, vocabulary)

    @classmethod
    def _vllm(cls, file: Path, config: dict[str, Any], hidden: int, vocabulary: int) -> Self:
        pieces = {name.removeprefix("medusa_heads."): piece for name, piece in read_pieces(file).items()}
        count, depth = _counted(file, pieces, r"blocks\.(\d+)\.layers\.(\d+)\.weight")
        heads = [f"lm_heads.{k}.weight" for k in range(1 if config.get(SHARED) else count)]
        blocks = [[f"blocks.{k}.layers.{j}" for j in range(depth)] for k in range(count)]
        words = pieces.pop("token_map", None)
        biased = any(name.endswith(".bias") for name in pieces)
        parts = ("weight", "bias") if biased else ("weight",)
        require_names(
            file, pieces, heads + [f"{name}.{part}" for layers in blocks for name in layers for part in parts]
        )
        said = read_words(file, None if words is None else words.weight, vocabulary)
        for name in heads:
            require_shape(file, name, pieces[name], vocabulary if said is None else len(said), hidden)
        return cls(
            _blocks(file, pieces, blocks, hidden),
            [pieces[name] for name in heads],
            said,
            read_accuracy(file, config, count),
        )

    @classmethod
    def _authors(cls, file: Path, hidden: int, vocabulary: int) -> Self:
        pieces = read_pieces(file)
        count, depth = _counted(file, pieces, r"(\d+)\.(\d+)\.linear\.weight")
        blocks = [[f"{k}.{j}.linear" for j in range(depth)] for k in range(count)]
        heads = [f"{k}.{depth}.weight" for k in range(count)]
        # What calls itself version 2 has none, and uses the target's.
        heads = heads if pieces.keys() & set(heads) else []
        require_names(
            file,
            pieces,
            heads + [f"{name}.{part}" for names in blocks for name in names for part in ("weight", "bias")],
        )
        for name in heads:
            require_shape(file, name, pieces[name], vocabulary, hidden)
        return cls(_blocks(file, pieces, blocks, hidden), [pieces[name] for name in heads])

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Write vLLM's format; what is stored in blocks only hasten reads.

        Args:
            config: what else the configuration says.

        Raises:
            UserError: it cannot be written.
        """
        tensors: dict[str, Tensor | Piece] = {f"lm_heads.{k}.weight": head for k, head in enumerate(self.heads)}
        for k, layers in enumerate(self.blocks):
            for j, block in enumerate(layers):
                assert block.bias is not None
                tensors |= {f"blocks.{k}.layers.{j}.weight": block, f"blocks.{k}.layers.{j}.bias": block.bias}
        if self.words is not None:
            tensors["token_map"] = self.words
        save(
            folder,
            {
                "model_type": "medusa",
                "architectures": ["MedusaModel"],
                "num_heads": len(self.blocks),
                "num_hidden_layers": len(self.blocks[0]),
                "medusa_fc_bias": True,
                SHARED: len(self.heads) == 1 < len(self.blocks),
                "accuracy": [list(ranks) for ranks in self.accuracy],
                **config,
            },
            tensors,
        )


def _counted(file: Path, names: Iterable[str], pattern: str) -> tuple[int, int]:
    """How many heads there are, and residual blocks of each.

    Raises:
        UserError: none.
    """
    numbers = [tuple(map(int, match.groups())) for name in names if (match := re.fullmatch(pattern, name))]
    if not numbers:
        raise UserError(f"{file} holds no heads of medusa")
    return max(k for k, _ in numbers) + 1, max(j for _, j in numbers) + 1


def _blocks(file: Path, pieces: Mapping[str, Piece], names: list[list[str]], hidden: int) -> list[list[Piece]]:
    """Residual blocks by their names; biases of zero where the file has none."""
    none = Piece(torch.zeros(hidden))
    blocks = []
    for layers in names:
        biases = [pieces.get(f"{name}.bias", none) for name in layers]
        for name, bias in zip(layers, biases, strict=True):
            require_shape(file, f"{name}.weight", pieces[f"{name}.weight"], hidden, hidden)
            require_shape(file, f"{name}.bias", bias, hidden)
        blocks.append(
            [with_bias(pieces[f"{name}.weight"], bias.weight) for name, bias in zip(layers, biases, strict=True)]
        )
    return blocks


@dataclass(frozen=True)
class MedusaParameters(TreeParameters):
    """Those of all trees of heads, with their defaults."""

    slug: ClassVar[str] = "medusa"


class MedusaHeads:
    """Trained heads in the target's own storage."""

    def __init__(self, target: Decoder, weights: MedusaWeights) -> None:
        linear = partial(linear_of, target)
        self.blocks = [[linear(block) for block in layers] for layers in weights.blocks]
        self.heads: list[Linear] = [linear(head) for head in weights.heads] or [target.head]
        self.words = None if weights.words is None else weights.words.to(target.device)
        linears = [*(block for layers in self.blocks for block in layers), *self.heads]
        self.own_bytes = sum(each.nbytes() for each in linears if each is not target.head)

    def scratch_bytes(self, rows: int) -> int:
        """Of all heads' states of so many rows, at most, which are joined, and perhaps made float32; no logits."""
        wide = self.blocks[0][0].out_features
        # Those of the head that is computed beside them: what enters a block, its products, their SiLU and the sum.
        return rows * wide * torch.float32.itemsize * (3 * len(self.blocks) + 4)

    def logits(self, states: Tensor) -> Tensor:
        """[rows, heads, words] from states [rows, hidden]."""
        each = []
        for layers in self.blocks:
            x = states
            for block in layers:
                x = x + F.silu(block.forward(x))
            each.append(x)
        hidden = torch.stack(each, 1)
        if len(self.heads) == 1:
            # A matrix that all share is read once.
            return torch.unflatten(logits_of(self.heads[0], hidden.flatten(0, 1)), 0, hidden.shape[:2])
        return torch.stack([logits_of(head, hidden[:, k]) for k, head in enumerate(self.heads)], 1)


@register(
    "medusa",
    family="heads",
    exactness="lossless",
    paper="2401.10774",
    title="Medusa: heads say the tokens behind the next one",
    parameters=MedusaParameters,
    needs_training=True,
    command="hasten train medusa --model MODEL",
    defaults=own_head("medusa"),
)
class Medusa(StateDrafter):
    """A tree per request, of all heads' likeliest tokens.

    Raises:
        UserError: no heads, or some for another target; a static tree of heads whose accuracy nobody measured.
    """

    def __init__(self, target: Target, parameters: MedusaParameters) -> None:
        model, self.parameters = require_decoder(target, "medusa"), parameters
        if not parameters.head:
            raise UserError("medusa needs heads for this model: `hasten train medusa --model MODEL` makes them")
        config = model.config
        weights = MedusaWeights.load(Path(parameters.head), config.hidden_size, config.vocab_size)
        self.heads, self.paths = MedusaHeads(model, weights), None
        guesses = Guesses(self.heads.words, noise=parameters.tree != "static")
        super().__init__(model, guesses, Sizing(target) if parameters.sized else None)
        if parameters.tree == "static":
            if not weights.accuracy:
                raise UserError(f"medusa: {parameters.head} does not say how often its heads are right: tree=dynamic")
            self.paths = static_paths([each[: parameters.ranks] for each in weights.accuracy], parameters.nodes)

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + self.heads.own_bytes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        rows = len(requests)
        logits = self.guesses.scratch_bytes(rows * len(self.heads.blocks), self.heads.heads[0].out_features)
        return self.heads.scratch_bytes(rows) + logits

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        logits = self.heads.logits(states)
        counts = [logits.shape[1]] * len(requests)
        found = self.guesses.levels(requests, counts, logits.flatten(0, 1), self.parameters.ranks)
        drafts = [self._tree(levels, budget) for levels, budget in zip(found, budgets, strict=True)]
        for request, draft in zip(requests, drafts, strict=True):
            self.guesses.made_of_levels(request, draft)
        return drafts

    def _tree(self, levels: Sequence[list[Child]], budget: int) -> Draft:
        """The best tree of children that all nodes of a level have."""
        if self.paths is not None:
            return drawn_up(self.paths[:budget], [[token for token, _ in level] for level in levels])
        return best_of_levels(levels, min(budget, self.parameters.nodes))
