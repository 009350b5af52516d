"""Folders of EAGLE heads: the authors' formats of EAGLE-1 and -2, and of EAGLE-3, and speculators' of the latter.

Beside these, matrices may be stored in blocks, which hasten alone reads.

What is missing, too much, of another shape or not finite is refused by name: a tensor that is left at random would
never change the text, only nobody would know why nothing is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.methods.heads.files import CONFIG, WEIGHTS, read_config, read_pieces, require_names, require_shape, save
from hasten.methods.heads.pieces import with_bias
from hasten.model.architectures.base import ARCHITECTURES
from hasten.model.config import LayerConfig, ModelConfig
from hasten.model.weights import Piece

PICKLE = "pytorch_model.bin"
"""The weights' file in older folders."""
LAYER = {
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "attention_out": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
PAIR = {"token_norm": "input_layernorm.weight", "mixer_norm": "hidden_norm.weight"}
"""What the layer of EAGLE-3 has beside those."""
OPTIONAL = {"embed_tokens.weight", "d2t", "t2d"}
"""The target's embedding, and the map of words, where only some may be said."""
AUX, WORDS_SAID = "eagle_aux_hidden_state_layer_ids", "draft_vocab_size"


def default_taps(layers: int) -> tuple[int, ...]:
    """The layers whose inputs EAGLE-3 reads, of a target of so many: a low one, the middle, a high one."""
    return tuple(sorted((min(2, layers - 1), layers // 2, max(layers - 3, 0))))


def layer_fields(target: ModelConfig) -> dict[str, Any]:
    """The configuration of a head whose layer has the shape of a target's first one, and its rope."""
    shape, rope = target.layers[0], target.source["rope_parameters"]
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.slots.heads,
        "head_dim": shape.slots.key_width,
        "hidden_act": "silu",
        "rms_norm_eps": target.norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "max_position_embeddings": target.source["max_position_embeddings"],
        "vocab_size": target.vocab_size,
        "tie_word_embeddings": False,
    }


@dataclass(frozen=True)
class EagleWeights:
    """A trained head.

    Attributes:
        version: 1 (which EAGLE-2 uses, too) or 3.
        config: of its one layer; its rope is its own, not the target's.
        fusion: [hidden, 2 hidden] from a token's embedding and a final state (1; it may have a bias), or [hidden, taps
            * target's hidden].
        layer: its matrices and norms, by the names of `LAYER`, and of `PAIR` for EAGLE-3.
        norm: [hidden], before the head; None for EAGLE-1, whose outputs are final states already.
        head: [words, hidden]; None where it is the target's, or those rows of it that `words` names.
        words: int64 [words], the tokens that the head may say, ascending; None for all.
        embedding: [vocabulary, hidden]; None where it is the target's.
        taps: layers of the target whose inputs are read; of EAGLE-3.
        normed_residual: whether the residual stream begins with the normed state.
    """

    version: int
    config: ModelConfig
    fusion: Piece
    layer: Mapping[str, Piece]
    norm: Piece | None
    head: Piece | None
    words: Tensor | None
    embedding: Piece | None
    taps: tuple[int, ...] = ()
    normed_residual: bool = False

    @classmethod
    def load(cls, folder: Path, target: ModelConfig) -> Self:
        """Read a folder, whichever format it has.

        Raises:
            UserError: no head, a damaged one, or one for another target.
        """
        if not folder.is_dir():
            raise UserError(f"eagle: there is no head in {folder}: `hasten train eagle --model MODEL` makes one")
        file = folder / (WEIGHTS if (folder / WEIGHTS).exists() else PICKLE)
        pieces = {
            name: piece
            for name, piece in read_pieces(file).items()
            if not name.endswith("rotary_emb.inv_freq") and not name.startswith("verifier_")
        }
        return cls._read(file, read_config(folder), pieces, target)

    @classmethod
    def _read(cls, file: Path, raw: dict[str, Any], pieces: dict[str, Piece], target: ModelConfig) -> Self:
        where = "midlayer." if any(name.startswith("midlayer.") for name in pieces) else "layers.0."
        version = 3 if where + PAIR["mixer_norm"] in pieces or where == "midlayer." else 1
        names = {part: where + name for part, name in (LAYER | (PAIR if version == 3 else {})).items()}
        # Without a map of words the head of EAGLE-3 is its own; with one, rows of the target's may stand for it.
        own = {"norm.weight"} if version == 3 else set()
        optional = OPTIONAL | ({"fc.bias"} if version == 1 else {"lm_head.weight"})
        require_names(file, pieces.keys() - optional, {"fc.weight", *names.values(), *own})
        config = _config(file, raw, target)
        _require_config(file, config, pieces[names["query"]])
        hidden, shape = config.hidden_size, config.layers[0]
        words = _words(file, pieces, target.vocab_size)
        vocabulary = target.vocab_size if words is None else len(words)
        taps = _taps(file, raw, pieces["fc.weight"], target) if version == 3 else ()
        read = len(taps) * target.hidden_size if version == 3 else 2 * hidden
        wanted = {"fc.weight": (hidden, read), "norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
        wanted |= {"embed_tokens.weight": (target.vocab_size, hidden), "fc.bias": (hidden,)}
        sizes = _shapes(hidden, shape, version)
        wanted |= {name: sizes[part] for part, name in names.items()}
        for name in wanted.keys() & pieces.keys():
            require_shape(file, name, pieces[name], *wanted[name])
        same_width = hidden == target.hidden_size
        if not same_width and (version == 1 or not {"embed_tokens.weight", "lm_head.weight"} <= pieces.keys()):
            raise UserError(f"{file}: the head is {hidden} wide, the target {target.hidden_size}")
        bias = pieces.get("fc.bias")
        return cls(
            version, config, with_bias(pieces["fc.weight"], None if bias is None else bias.weight),
            {part: pieces[name] for part, name in names.items()}, pieces.get("norm.weight"),
            pieces.get("lm_head.weight"), words, pieces.get("embed_tokens.weight"), taps,
            _switch(file, raw, "norm_before_residual"),
        )  # fmt: skip

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Write the authors' format; what is stored in blocks only hasten reads.

        Args:
            config: what else the configuration says; the fields of the layer's must be among it.

        Raises:
            UserError: it cannot be written.
        """
        where, names = ("layers.0.", LAYER) if self.version == 1 else ("midlayer.", LAYER | PAIR)
        tensors: dict[str, Tensor | Piece] = {"fc.weight": self.fusion}
        tensors |= {where + names[part]: piece for part, piece in self.layer.items()}
        further = {"fc.bias": self.fusion.bias, "norm.weight": self.norm, "lm_head.weight": self.head}
        further |= {"embed_tokens.weight": self.embedding}
        tensors |= {name: each for name, each in further.items() if each is not None}
        said = self.config.vocab_size
        if self.words is not None:
            said = len(self.words)
            covered = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            covered[self.words] = True
            tensors |= {"d2t": self.words - torch.arange(said), "t2d": covered}
        names_of_it = {1: "EagleLlamaForCausalLM", 3: "LlamaForCausalLMEagle3"}
        told: dict[str, Any] = {"architectures": [names_of_it[self.version]], "model_type": "llama"}
        if self.version == 3:
            told |= {WORDS_SAID: said, AUX: list(self.taps), "norm_before_residual": self.normed_residual}
        save(folder, told | config, tensors)


def _config(file: Path, raw: dict[str, Any], target: ModelConfig) -> ModelConfig:
    """What a head's configuration says of its layer.

    Raises:
        UserError: it lacks something, or says what is not supported.
    """
    fields = {**raw, **raw.get("transformer_layer_config", {})}
    # Speculators' and vLLM's files call the architecture by other names; one layer is what is read.
    fields |= {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": target.vocab_size}
    fields.setdefault("max_position_embeddings", target.max_positions)
    try:
        return ARCHITECTURES["llama"].config(fields)
    except UserError as error:
        raise UserError(f"{file.with_name(CONFIG)}: {error}") from error


def _require_config(file: Path, config: ModelConfig, query: Piece) -> None:
    shape = config.layers[0]
    rows = shape.heads * shape.slots.key_width
    if query.shape[0] != rows:
        raise UserError(f"{file}: queries have {query.shape[0]} rows, and {CONFIG} says {rows}")


def _shapes(hidden: int, shape: LayerConfig, version: int) -> dict[str, tuple[int, ...]]:
    """Of a layer's tensors, by piece."""
    read, width = hidden * (2 if version == 3 else 1), shape.slots.key_width
    kept = (shape.slots.heads * width, read)
    return {
        "query": (shape.heads * width, read), "key": kept, "value": kept,
        "attention_out": (hidden, shape.heads * width),
        "gate": (shape.ffn, hidden), "up": (shape.ffn, hidden), "down": (hidden, shape.ffn),
        "mlp_norm": (hidden,), "token_norm": (hidden,), "mixer_norm": (hidden,),
    }  # fmt: skip


def _words(file: Path, pieces: Mapping[str, Piece], vocabulary: int) -> Tensor | None:
    """The tokens of a head's rows: row i says token i + d2t[i].

    Raises:
        UserError: not ascending tokens of the target, or another set than t2d's.
    """
    offsets, covered = (pieces[name].weight if name in pieces else None for name in ("d2t", "t2d"))
    if offsets is None and covered is None:
        return None
    if offsets is None or offsets.dtype != torch.int64 or offsets.ndim != 1 or not len(offsets):
        raise UserError(f"{file}: d2t must be whole numbers, one for each word of the head")
    words = offsets + torch.arange(len(offsets))
    if not bool((words[1:] > words[:-1]).all()) or int(words[0]) < 0 or int(words[-1]) >= vocabulary:
        raise UserError(f"{file}: d2t must be offsets that give ascending tokens below {vocabulary}")
    if covered is not None:
        require_shape(file, "t2d", covered, vocabulary)
        if not torch.equal(covered.nonzero().flatten(), words):
            raise UserError(f"{file}: t2d and d2t name other words")
    return words


def _taps(file: Path, raw: dict[str, Any], fusion: Piece, target: ModelConfig) -> tuple[int, ...]:
    """The layers of the target that are read.

    Raises:
        UserError: no such layers, or not as many as the fusion reads.
    """
    layers = len(target.layers)
    given = raw.get(AUX) or (raw.get("eagle_config") or {}).get(AUX)
    taps = default_taps(layers) if given is None else given
    if not isinstance(taps, list | tuple) or not all(type(tap) is int and 0 <= tap < layers for tap in taps):
        raise UserError(f"{file.with_name(CONFIG)}: {AUX} {taps} must be layers of the target, which has {layers}")
    if len(fusion.shape) != 2 or fusion.shape[1] != len(taps) * target.hidden_size:
        wanted = f"{len(taps)} states of {target.hidden_size}"
        raise UserError(f"{file}: fc.weight is {list(fusion.shape)}, and must read {wanted}")
    return tuple(taps)


def _switch(file: Path, raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if type(value) is not bool:
        raise UserError(f"{file.with_name(CONFIG)}: {name} must be true or false, not {value!r}")
    return value
