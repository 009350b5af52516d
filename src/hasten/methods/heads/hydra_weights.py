"""What Hydra's heads are made of, and the authors' two formats: `mlp`, and `prefix-mlp` with a layer of its own.

Tensors have the authors' names (zankner/Hydra, `hydra_lm_head.pt`): `hydra_mlp.K.J.linear` and `.res_connection` with
J = 0, 1, .. (`mlp`) or 1, 3, .. (`prefix-mlp`, whose places between are dropout), `hydra_lm_head.K` (`prefix-mlp`:
`hydra_lm_head.K.1`) and `prefix_embeding_layer` (sic). A head's blocks beyond the first are one block, which the
authors store as often as it is run, and hasten once. The copies of the target's embedding are not read. hasten writes
the same names into `model.safetensors`; new are `token_map`, matrices in blocks, and in the configuration
`shared_lm_head`, where all heads have the one output matrix that is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.methods.heads.files import (
    CONFIG,
    WEIGHTS,
    read_accuracy,
    read_config,
    read_pieces,
    read_words,
    require_names,
    require_shape,
    save,
)
from hasten.methods.heads.pieces import with_bias
from hasten.model.weights import Piece

AUTHORS = ("hydra_lm_head.safetensors", "hydra_lm_head.pt")
SHARED = "shared_lm_head"
PREFIX = "prefix_embeding_layer."
"""In front of a Llama's names of the prefix layer (layer 0) and of its norm."""
COPIES = ("input_embed_fn.weight", f"{PREFIX}embed_tokens.weight", f"{PREFIX}layers.0.self_attn.rotary_emb.inv_freq")
"""What the authors' files have, and the target has, too."""
ARCHITECTURES = ("mlp", "prefix-mlp")


@dataclass(frozen=True)
class HydraHead:
    """One head, which reads the target's state and the embeddings of `inputs - 1` tokens, side by side.

    Attributes:
        mix, carry: [hidden, inputs * hidden] with biases: `carry z + SiLU(mix z)`.
        block: [hidden, hidden] with bias, of all residual blocks that follow; None where there are none.
    """

    mix: Piece
    carry: Piece
    block: Piece | None = None


@dataclass(frozen=True)
class HydraWeights:
    """Trained heads.

    Attributes:
        heads: head K reads K + 1 tokens.
        outputs: per head [words, hidden] with bias [words]; a single one where all share it.
        layers: blocks of each head, the first one included.
        words: int64 [words], the token of each row of an output, ascending; None where it is all of the vocabulary.
        accuracy: per head, how often each rank was right on held-out text behind right tokens; empty where nobody
            measured it.
        prefix: the prefix layer's tensors by a Llama's names (`layers.0.self_attn.q_proj.weight`, `norm.weight`); empty
            where heads read the target's states.
    """

    heads: list[HydraHead]
    outputs: list[Piece]
    layers: int = 1
    words: Tensor | None = None
    accuracy: tuple[tuple[float, ...], ...] = ()
    prefix: Mapping[str, Piece] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, hidden: int, vocabulary: int) -> Self:
        """Read a folder of either format.

        Args:
            hidden, vocabulary: of the target.

        Raises:
            UserError: no heads, damaged ones, of a kind that is not known, or some for another target.
        """
        if not folder.is_dir():
            raise UserError(f"hydra: there are no heads in {folder}: `hasten train hydra --model MODEL` makes them")
        config = read_config(folder)
        _require_known(folder, config)
        file = next((folder / name for name in AUTHORS if (folder / name).exists()), folder / WEIGHTS)
        pieces = {name: piece for name, piece in read_pieces(file).items() if name not in COPIES}
        prefix = {name.removeprefix(PREFIX): piece for name, piece in pieces.items() if name.startswith(PREFIX)}
        layout = _Layout(bool(prefix))
        count, blocks = layout.counted(file, pieces)
        words = pieces.pop("token_map", None)
        said = read_words(file, None if words is None else words.weight, vocabulary)
        outputs = [layout.output(k) for k in range(1 if config.get(SHARED) else count)]
        firsts = [f"{layout.block(k, 0)}.{part}" for k in range(count) for part in ("linear", "res_connection")]
        deeper = [f"{layout.block(k, j)}.linear" for k in range(count) for j in range(1, blocks)]
        require_names(
            file,
            (name for name in pieces if not name.startswith(PREFIX)),
            (f"{name}.{part}" for name in (*outputs, *firsts, *deeper) for part in ("weight", "bias")),
        )

        def piece(name: str, *shape: int) -> Piece:
            require_shape(file, f"{name}.weight", pieces[f"{name}.weight"], *shape)
            require_shape(file, f"{name}.bias", pieces[f"{name}.bias"], shape[0])
            return with_bias(pieces[f"{name}.weight"], pieces[f"{name}.bias"].weight)

        heads = []
        for k in range(count):
            first = layout.block(k, 0)
            rest = [piece(f"{layout.block(k, j)}.linear", hidden, hidden) for j in range(1, blocks)]
            _require_alike(file, rest)
            heads.append(
                HydraHead(
                    piece(f"{first}.linear", hidden, (k + 2) * hidden),
                    piece(f"{first}.res_connection", hidden, (k + 2) * hidden),
                    rest[0] if rest else None,
                )
            )
        size = vocabulary if said is None else len(said)
        return cls(
            heads,
            [piece(name, size, hidden) for name in outputs],
            _layers(file, config, blocks),
            said,
            read_accuracy(file, config, count),
            prefix,
        )

    def save(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write it.

        Args:
            config: what else the configuration says.

        Raises:
            UserError: it cannot be written.
        """
        layout = _Layout(bool(self.prefix))
        named = {layout.output(k): output for k, output in enumerate(self.outputs)}
        for k, head in enumerate(self.heads):
            named |= {f"{layout.block(k, 0)}.linear": head.mix, f"{layout.block(k, 0)}.res_connection": head.carry}
            if head.block is not None:
                named[f"{layout.block(k, 1)}.linear"] = head.block
        tensors: dict[str, Tensor | Piece] = {}
        for name, piece in named.items():
            assert piece.bias is not None
            tensors |= {f"{name}.weight": piece, f"{name}.bias": piece.bias}
        tensors |= {PREFIX + name: piece for name, piece in self.prefix.items()}
        if self.words is not None:
            tensors["token_map"] = self.words
        save(
            folder,
            {
                "model_type": "hydra",
                "hydra_head_arch": ARCHITECTURES[bool(self.prefix)],
                "hydra_num_heads": len(self.heads),
                "hydra_num_layers": self.layers,
                "grounded_heads": True,
                "hidden_state_offset": 0,
                SHARED: len(self.outputs) == 1 < len(self.heads),
                "accuracy": [list(ranks) for ranks in self.accuracy],
                **config,
            },
            tensors,
        )


@dataclass(frozen=True)
class _Layout:
    """How a format names what heads are made of.

    Attributes:
        prefix: whether it is the one with a prefix layer.
    """

    prefix: bool

    def block(self, head: int, number: int) -> str:
        return f"hydra_mlp.{head}.{2 * number + 1 if self.prefix else number}"

    def output(self, head: int) -> str:
        return f"hydra_lm_head.{head}.1" if self.prefix else f"hydra_lm_head.{head}"

    def counted(self, file: Path, pieces: Mapping[str, Piece]) -> tuple[int, int]:
        """How many heads there are, and how many blocks are stored of each.

        Raises:
            UserError: none.
        """
        found = [re.fullmatch(r"hydra_mlp\.(\d+)\.(\d+)\.linear\.weight", name) for name in pieces]
        numbers = [(int(match[1]), int(match[2])) for match in found if match]
        if not numbers:
            raise UserError(f"{file} holds no heads of hydra")
        last = max(place for _, place in numbers)
        return max(head for head, _ in numbers) + 1, 1 + (last // 2 if self.prefix else last)


def _require_known(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse by name what these heads could be, and are not here."""
    for key, known in (("hydra_head_arch", ARCHITECTURES), ("grounded_heads", (True,)), ("hidden_state_offset", (0,))):
        if key in config and config[key] not in known:
            raise UserError(f"{folder / CONFIG}: {key} is {config[key]!r}, and must be {' or '.join(map(repr, known))}")


def _layers(file: Path, config: Mapping[str, Any], blocks: int) -> int:
    """How often blocks are run: stored once, the second one may stand for all that follow."""
    layers = config.get("hydra_num_layers", blocks)
    if not isinstance(layers, int) or (layers != blocks and not (blocks == 2 < layers)):
        raise UserError(
            f"{file.with_name(CONFIG)}: hydra_num_layers is {layers!r}, and {file.name} has {blocks} of each head"
        )
    return layers


def _require_alike(file: Path, blocks: list[Piece]) -> None:
    for other in blocks[1:]:
        assert blocks[0].bias is not None and other.bias is not None
        if not (torch.equal(blocks[0].weight, other.weight) and torch.equal(blocks[0].bias, other.bias)):
            raise UserError(f"{file}: the blocks of a head beyond its first must be the same block")
