"""What Chimera is made of, and its two formats: the authors' three files, and one file with the same names.

The authors (kafkayu/Chimera) write `trimlp.pt`, `fast_layer1.pt` and `chimera_head.pt`; hasten writes
`model.safetensors`, where the file's name stands in front of each tensor's. New there are `token_map`, `trimlp.narrow`,
matrices in blocks, and heads that are [hidden, hidden] in front of one `lm_head`: the authors' are [vocabulary, 2
hidden] each, larger than a small target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from hasten.errors import UserError
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
from hasten.methods.heads.pieces import stacked, with_bias
from hasten.model.weights import Piece

AUTHORS = ("trimlp", "fast_layer1", "chimera_head")
MIX, OUT, NARROW, SAID = "trimlp.0.linear", "trimlp.1.weight", "trimlp.narrow.weight", "lm_head.weight"
LAYER, COPY = "fast_layer1.0.", "fast_layer1.0.self_attn.rotary_emb.inv_freq"
"""In front of a Llama's names; and what the authors' file has, and the target has, too."""
TRIGRAM = 3


@dataclass(frozen=True)
class LayerWeights:
    """A Llama's layer: see `hasten.model.weights.Pieces`."""

    mixer_norm: Piece
    queries: Piece
    keys: Piece
    values: Piece
    attention_out: Piece
    mlp_norm: Piece
    gate: Piece
    up: Piece
    down: Piece

    @property
    def pieces(self) -> dict[str, Piece]:
        """As a decoder is assembled of them."""
        return {
            "mixer_norm": self.mixer_norm,
            "qkv": stacked([self.queries, self.keys, self.values]),
            "attention_out": self.attention_out,
            "mlp_norm": self.mlp_norm,
            "gate_up": stacked([self.gate, self.up]),
            "down": self.down,
        }


NAMES = {
    "mixer_norm": "input_layernorm",
    "queries": "self_attn.q_proj",
    "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""A Llama's, of each part of `LayerWeights`."""


@dataclass(frozen=True)
class ChimeraWeights:
    """Trained weights, for embeddings and states of `hidden` channels.

    Attributes:
        mix: [3 width, 3 width] with bias, on the embeddings of three tokens side by side.
        out: [hidden, 3 width].
        narrow: [width, hidden], what each of the three goes through before; None where they stay as wide as they are.
        layer: the one that sees all states.
        heads: per level [hidden, hidden], what the target's state adds to the estimate that `said` then reads; or
            [words, 2 hidden], a head on both.
        said: [words, hidden]; None where the target's own head stands there, or none is needed.
        words: int64 [words], the tokens that may be said, ascending; None where these are all.
        accuracy: per level, how often each rank was right on held-out text behind right tokens; empty where nobody
            measured it.
    """

    mix: Piece
    out: Piece
    layer: LayerWeights
    heads: list[Piece]
    narrow: Piece | None = None
    said: Piece | None = None
    words: Tensor | None = None
    accuracy: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def load(cls, folder: Path, hidden: int, vocabulary: int, head_dim: int) -> Self:
        """Read a folder of either format.

        Args:
            hidden, vocabulary, head_dim: of the target.

        Raises:
            UserError: nothing there, damaged files, or some for another target.
        """
        if not folder.is_dir():
            raise UserError(f"chimera: there are no heads in {folder}: `hasten train chimera --model MODEL` makes them")
        file, pieces = _read(folder)
        count = sum(re.fullmatch(r"chimera_head\.\d+\.0\.weight", name) is not None for name in pieces)
        if not count:
            raise UserError(f"{file} holds no heads of chimera")
        given = pieces.pop("token_map", None)
        words = read_words(file, None if given is None else given.weight, vocabulary)
        narrow, said = pieces.pop(NARROW, None), pieces.pop(SAID, None)
        parts = {part: f"{LAYER}{name}.weight" for part, name in NAMES.items()}
        heads = [f"chimera_head.{k}.0.weight" for k in range(count)]
        require_names(file, pieces, [f"{MIX}.weight", f"{MIX}.bias", OUT, *parts.values(), *heads])
        width = TRIGRAM * (hidden if narrow is None else narrow.shape[0])
        if narrow is not None:
            require_shape(file, NARROW, narrow, narrow.shape[0], hidden)
        require_shape(file, f"{MIX}.weight", pieces[f"{MIX}.weight"], width, width)
        require_shape(file, f"{MIX}.bias", pieces[f"{MIX}.bias"], width)
        require_shape(file, OUT, pieces[OUT], hidden, width)
        size = vocabulary if words is None else len(words)
        for name in heads:
            wide = pieces[name].shape[-1:] == (2 * hidden,)
            require_shape(file, name, pieces[name], *((size, 2 * hidden) if wide else (hidden, hidden)))
        kinds = {pieces[name].shape for name in heads}
        if len(kinds) > 1:
            raise UserError(f"{file}: heads must all be of one kind")
        if said is not None:
            require_shape(file, SAID, said, size, hidden)
        elif words is not None and kinds == {(hidden, hidden)}:
            raise UserError(f"{file} has a token_map, and no {SAID} for its words")
        return cls(
            with_bias(pieces[f"{MIX}.weight"], pieces[f"{MIX}.bias"].weight),
            pieces[OUT],
            _layer(file, {part: pieces[name] for part, name in parts.items()}, hidden, head_dim),
            [pieces[name] for name in heads],
            narrow,
            said,
            words,
            read_accuracy(file, read_config(folder), count),
        )

    def save(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write one file.

        Args:
            config: what else the configuration says.

        Raises:
            UserError: it cannot be written.
        """
        assert self.mix.bias is not None
        tensors: dict[str, Tensor | Piece] = {f"{MIX}.weight": self.mix, f"{MIX}.bias": self.mix.bias, OUT: self.out}
        tensors |= {f"{LAYER}{name}.weight": getattr(self.layer, part) for part, name in NAMES.items()}
        tensors |= {f"chimera_head.{k}.0.weight": head for k, head in enumerate(self.heads)}
        tensors |= {name: piece for name, piece in ((NARROW, self.narrow), (SAID, self.said)) if piece is not None}
        if self.words is not None:
            tensors["token_map"] = self.words
        told = {
            "model_type": "chimera",
            "chimera_num_heads": len(self.heads),
            "chimera_num_layers": 1,
            "accuracy": [list(ranks) for ranks in self.accuracy],
        }
        save(folder, {**told, **config}, tensors)


def _read(folder: Path) -> tuple[Path, dict[str, Piece]]:
    """All pieces by the names that hasten writes, and the file to name where something is wrong.

    Raises:
        UserError: a file is missing or damaged.
    """
    if not (folder / f"{AUTHORS[0]}.pt").exists():
        return folder / WEIGHTS, read_pieces(folder / WEIGHTS)
    pieces = {f"{part}.{name}": piece for part in AUTHORS for name, piece in read_pieces(folder / f"{part}.pt").items()}
    pieces.pop(COPY, None)
    return folder, pieces


def _layer(file: Path, parts: Mapping[str, Piece], hidden: int, head_dim: int) -> LayerWeights:
    """A layer whose parts fit each other.

    Raises:
        UserError: they do not.
    """
    own, shared, ffn = (parts[name].shape[0] for name in ("queries", "keys", "gate"))
    shapes: dict[str, tuple[int, ...]] = {
        "mixer_norm": (hidden,),
        "queries": (own, hidden),
        "keys": (shared, hidden),
        "values": (shared, hidden),
        "attention_out": (hidden, own),
        "mlp_norm": (hidden,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    for part, shape in shapes.items():
        require_shape(file, f"{LAYER}{NAMES[part]}.weight", parts[part], *shape)
    if own % head_dim or shared % head_dim or own % shared:
        raise UserError(f"{file}: {own} queries and {shared} keys are no heads of {head_dim} channels")
    return LayerWeights(**parts)
