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
(`K.J.linear`, `K.N`), with or without a matrix of its own per head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine import Draft, Request, Target, register
from hasten.errors import UserError
from hasten.methods.heads.files import CONFIG, WEIGHTS, read_config, read_tensors, require_names, require_shape, save
from hasten.methods.heads.head import StateDrafter, own_head, require_decoder
from hasten.methods.heads.tree import best_paths, drawn_up
from hasten.model import Decoder
from hasten.model.linear import Linear
from hasten.model.weights import HEAD, Piece

AUTHORS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
"""Files of the authors' format."""


@dataclass(frozen=True)
class MedusaWeights:
    """Trained heads.

    Attributes:
        blocks: per head, its residual blocks' weights [hidden, hidden] and biases [hidden].
        heads: per head [words, hidden]; empty where all use the target's own.
        words: int64 [words], the token of each row of a head, ascending; None where it is all of the vocabulary.
        accuracy: per head, how often each rank was right on held-out text; empty where nobody measured it.
    """

    blocks: list[list[tuple[Tensor, Tensor]]]
    heads: list[Tensor]
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
        tensors = {name.removeprefix("medusa_heads."): tensor for name, tensor in read_tensors(file).items()}
        count, depth = _counted(file, tensors, r"blocks\.(\d+)\.layers\.(\d+)\.weight")
        wanted = {f"lm_heads.{k}.weight" for k in range(count)}
        biased = any(name.endswith(".bias") for name in tensors)
        for k in range(count):
            for j in range(depth):
                wanted |= {f"blocks.{k}.layers.{j}.weight"} | ({f"blocks.{k}.layers.{j}.bias"} if biased else set())
        require_names(file, tensors.keys() - {"token_map"}, wanted)
        words = tensors.get("token_map")
        size = vocabulary if words is None else len(words)
        if words is not None:
            _require_words(file, words, vocabulary)
        for k in range(count):
            require_shape(file, f"lm_heads.{k}.weight", tensors[f"lm_heads.{k}.weight"], size, hidden)
        zeros = torch.zeros(hidden)
        blocks = [
            [
                (tensors[f"blocks.{k}.layers.{j}.weight"], tensors.get(f"blocks.{k}.layers.{j}.bias", zeros))
                for j in range(depth)
            ]
            for k in range(count)
        ]
        _require_blocks(file, blocks, hidden)
        return cls(
            blocks, [tensors[f"lm_heads.{k}.weight"] for k in range(count)], words, _accuracy(file, config, count)
        )

    @classmethod
    def _authors(cls, file: Path, hidden: int, vocabulary: int) -> Self:
        tensors = read_tensors(file)
        count, depth = _counted(file, tensors, r"(\d+)\.(\d+)\.linear\.weight")
        parts = {f"{k}.{j}.linear.{part}" for k in range(count) for j in range(depth) for part in ("weight", "bias")}
        heads = {f"{k}.{depth}.weight" for k in range(count)}
        # What calls itself version 2 has none, and uses the target's.
        private = bool(heads & tensors.keys())
        require_names(file, tensors, parts | heads if private else parts)
        blocks = [
            [(tensors[f"{k}.{j}.linear.weight"], tensors[f"{k}.{j}.linear.bias"]) for j in range(depth)]
            for k in range(count)
        ]
        _require_blocks(file, blocks, hidden)
        if private:
            for name in sorted(heads):
                require_shape(file, name, tensors[name], vocabulary, hidden)
        return cls(blocks, [tensors[f"{k}.{depth}.weight"] for k in range(count)] if private else [])

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Write vLLM's format.

        Args:
            config: what else the configuration says.

        Raises:
            UserError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {f"lm_heads.{k}.weight": head for k, head in enumerate(self.heads)}
        for k, layers in enumerate(self.blocks):
            for j, (weight, bias) in enumerate(layers):
                tensors |= {f"blocks.{k}.layers.{j}.weight": weight, f"blocks.{k}.layers.{j}.bias": bias}
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
                "accuracy": [list(ranks) for ranks in self.accuracy],
                **config,
            },
            tensors,
        )


def _counted(file: Path, tensors: dict[str, Tensor], pattern: str) -> tuple[int, int]:
    """How many heads there are, and residual blocks of each.

    Raises:
        UserError: none.
    """
    numbers = [tuple(map(int, match.groups())) for name in tensors if (match := re.fullmatch(pattern, name))]
    if not numbers:
        raise UserError(f"{file} holds no heads of medusa")
    return max(k for k, _ in numbers) + 1, max(j for _, j in numbers) + 1


def _require_blocks(file: Path, blocks: list[list[tuple[Tensor, Tensor]]], hidden: int) -> None:
    for k, layers in enumerate(blocks):
        for weight, bias in layers:
            require_shape(file, f"the weight of head {k}", weight, hidden, hidden)
            require_shape(file, f"the bias of head {k}", bias, hidden)


def _require_words(file: Path, words: Tensor, vocabulary: int) -> None:
    ascending = words.ndim == 1 and words.dtype == torch.int64 and bool((words[1:] > words[:-1]).all())
    if not ascending or not len(words) or int(words[0]) < 0 or int(words[-1]) >= vocabulary:
        raise UserError(f"{file}: token_map must be ascending ids below {vocabulary}")


def _accuracy(file: Path, config: dict[str, Any], count: int) -> tuple[tuple[float, ...], ...]:
    given = config.get("accuracy", [])
    try:
        table = tuple(tuple(float(share) for share in ranks) for ranks in given)
    except (TypeError, ValueError):
        table = ((-1.0,),)
    if table and (len(table) != count or not all(0 <= share <= 1 for ranks in table for share in ranks)):
        raise UserError(f"{file.with_name(CONFIG)}: accuracy must be shares, a list for each of {count} heads")
    return table


@dataclass(frozen=True)
class MedusaParameters:
    """Parameters.

    Attributes:
        head: the folder of the heads; by default that beside the target.
        nodes: of the tree.
        ranks: tokens of each head that may be in it.
        tree: `dynamic`, by the heads' own probabilities, or `static`, by how often each rank is right.

    Raises:
        UserError: out of range.
    """

    head: str = ""
    nodes: int = 15
    ranks: int = 10
    tree: str = "dynamic"

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 64:
            raise UserError("medusa: nodes must be between 1 and 64")
        if not 1 <= self.ranks <= 64:
            raise UserError("medusa: ranks must be between 1 and 64")
        if self.tree not in ("dynamic", "static"):
            raise UserError(f"medusa: tree must be dynamic or static, not {self.tree!r}")


class MedusaHeads:
    """Trained heads in the target's own storage."""

    def __init__(self, target: Decoder, weights: MedusaWeights) -> None:
        dtype = target.dtype
        self.blocks = [
            [target.backend.linear(Piece(weight.to(dtype), bias.to(dtype)), HEAD) for weight, bias in layers]
            for layers in weights.blocks
        ]
        self.heads: list[Linear] = [target.backend.linear(Piece(head.to(dtype)), HEAD) for head in weights.heads]
        if not self.heads:
            self.heads = [target.head] * len(weights.blocks)
        self.words = None if weights.words is None else weights.words.to(target.device)
        self.own_bytes = sum(linear.nbytes() for linear in self._linears() if linear is not target.head)

    def _linears(self) -> list[Linear]:
        return [*(linear for layers in self.blocks for linear in layers), *self.heads]

    def likeliest(self, states: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """Probabilities and tokens [rows, heads, ranks], likeliest first.

        Args:
            states: [rows, hidden].
        """
        found = []
        for layers, head in zip(self.blocks, self.heads, strict=True):
            x = states
            for linear in layers:
                x = x + F.silu(linear.forward(x))
            logits = head.forward(x).float()
            best = logits.topk(min(ranks, logits.shape[1]), -1)
            found.append((torch.exp(best.values - logits.logsumexp(-1, keepdim=True)), best.indices))
        probabilities, rows = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        return probabilities, rows if self.words is None else self.words[rows]


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
        super().__init__(model)
        if not parameters.head:
            raise UserError("medusa needs heads for this model: `hasten train medusa --model MODEL` makes them")
        config = model.config
        weights = MedusaWeights.load(Path(parameters.head), config.hidden_size, config.vocab_size)
        self.heads, self.paths = MedusaHeads(model, weights), None
        if parameters.tree == "static":
            if not weights.accuracy:
                raise UserError(f"medusa: {parameters.head} does not say how often its heads are right: tree=dynamic")
            self.paths = best_paths([each[: parameters.ranks] for each in weights.accuracy], parameters.nodes)

    @property
    def reads_whole(self) -> bool:
        # It looks at the last row only.
        return False

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + self.heads.own_bytes

    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        probabilities, tokens = self.heads.likeliest(states, self.parameters.ranks)
        return [
            drawn_up((self.paths or best_paths(each, self.parameters.nodes))[:budget], words)
            for each, words, budget in zip(probabilities.tolist(), tokens.tolist(), budgets, strict=True)
        ]
