"""The registry of architectures, and what the Llama family shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.architectures.diffusion import read_diffusion
from hasten.model.checkpoint import Tensors
from hasten.model.config import LayerConfig, ModelConfig
from hasten.model.weights import Piece, Pieces, Stored

Fields = SimpleNamespace
"""A configuration's fields as attributes. transformers' configurations have the same ones; importing them takes longer
than importing PyTorch."""


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` is read: configuration, then weights.

    Attributes:
        defaults: fields that config.json may leave out, with the values that transformers gives them.
        read: the fields that say what the model is made of.
        pieces: those outside the layers, then layer by layer, from the configuration and the tensors.
        spelling: what config.json calls a field, where that is not transformers' name for it.
        diffusion: of an architecture that fills masked positions, what is known of how: see `read_diffusion`.
    """

    name: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    pieces: Callable[[ModelConfig, Tensors], Iterator[Pieces]]
    spelling: Mapping[str, str] = field(default_factory=dict)
    diffusion: Callable[[Fields], Mapping[str, Any]] = lambda config: {}

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """All that a config.json says.

        Raises:
            UserError: it lacks something, or says what is not supported.
        """
        fields = self.fields(raw)
        model = self.read(fields)
        return replace(model, diffusion=read_diffusion(model, self.diffusion(fields), raw.get("diffusion")))

    def fields(self, raw: Mapping[str, Any]) -> Fields:
        """A config.json with this architecture's defaults, and its rope as transformers 5 writes it.

        Raises:
            UserError: its rope is not the same for all layers.
        """
        spelt = {name: raw[theirs] for name, theirs in self.spelling.items() if raw.get(theirs) is not None}
        values = {**DEFAULTS, **self.defaults, **raw, **spelt}
        return Fields(**values | {"rope_parameters": rope_parameters(values)})


ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture loadable under its `model_type`."""
    ARCHITECTURES[architecture.name] = architecture


DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
}
"""Of all architectures here, where they do not say otherwise."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Fields that must be there, as whole numbers of at least 1."""

OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
"""The same, where they are not null."""

LARGEST = torch.finfo(torch.float32).max
"""Of constants: they become float32."""

MAY_BE_ZERO = ("mscale", "mscale_all_dim")
"""Numbers of a rope that may be 0, which leaves them out."""

ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")

SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
"""Fields that are true or false, or null where they are off."""


def require_number(name: str, value: object, zero: bool = False) -> None:
    """Refuse a constant that is not a finite number above 0; `zero` says whether it may be 0.

    Raises:
        UserError: with the field's name and its value.
    """
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if not sound or (value == 0 and not zero):
        wanted = "a finite number of at least 0" if zero else "a finite number above 0"
        raise UserError(f"config.json has {name} {value}, which must be {wanted}")


def rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of a configuration, also of an older one (`rope_scaling`, and `rope_theta` beside it).

    Raises:
        UserError: it is no object; layers differ in their rope.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json describes its rope by {given!r}, which must be an object")
    rope = dict(given)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("config.json describes a rope per type of layer, which is not supported")
    rope.setdefault("rope_type", rope.get("type", "default"))
    for name, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", 1.0)):
        given = values.get(name)
        rope.setdefault(name, default if given is None else given)
    if "original_max_position_embeddings" in values:
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return rope


class _RopeFields(Fields):
    """What transformers' rope formulas read of a configuration."""

    def standardize_rope_params(self) -> None:
        """They ask for it; `rope_parameters` has done it."""


def rotary_frequencies(config: Fields, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies and attention factor of the configuration's rope, within `context_limit`.

    The formulas are transformers' own, so scaled variants agree with it by construction.

    Raises:
        UserError: an unknown rope, or one with a number that makes no sense.
    """
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in ROPES:
        raise UserError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPES)}")
    for name, value in parameters.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            require_number(name, value, zero=name in MAY_BE_ZERO)
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    read: Any = _RopeFields(
        rope_parameters=parameters,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](read, torch.device("cpu"))
    return tuple(frequencies.tolist()), float(factor)


def context_limit(config: Fields) -> int:
    """How many positions a model has.

    A linear or a yarn rope stretches what its model was trained on, which `max_position_embeddings` often still is:
    vLLM reads it so. The frequencies of dynamic and longrope change once a text is longer than that, for what was read
    before as well: texts end there.
    """
    rope, positions = config.rope_parameters, int(config.max_position_embeddings)
    trained = rope.get("original_max_position_embeddings", positions)
    if rope["rope_type"] in ("linear", "yarn"):
        return max(positions, int(rope["factor"] * trained))
    return min(positions, int(trained)) if rope["rope_type"] == "longrope" else positions


def read_llama_family(
    config: Fields, windows: list[int | None] | None = None, spelling: Mapping[str, str] | None = None
) -> ModelConfig:
    """The fields that Llama, Mistral and Qwen share; `windows` has one entry per layer, `spelling` is for errors.

    Raises:
        UserError: a field is missing or makes no sense.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"activation {config.hidden_act!r} is not supported for {config.model_type}; only silu is")
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in SIZES}
    sizes |= {name: size for name in OPTIONAL_SIZES if (size := getattr(config, name, None)) is not None}
    sizes["sliding_window"] = min((window for window in windows or () if window is not None), default=1)
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            spelt = (spelling or {}).get(name, name)
            raise UserError(f"config.json has {spelt} {size}, which must be a whole number of at least 1")
    for name in SWITCHES:
        if not isinstance(value := getattr(config, name, None), bool | None):
            raise UserError(f"config.json has {name} {value!r}, which must be true or false")
    require_number("rms_norm_eps", config.rms_norm_eps, zero=True)
    heads = config.num_attention_heads
    kv_heads = sizes.get("num_key_value_heads", heads)
    head_dim = sizes.get("head_dim", config.hidden_size // heads)
    if heads % kv_heads:
        raise UserError(f"config.json has {heads} heads, which {kv_heads} key/value heads cannot share evenly")
    frequencies, factor = rotary_frequencies(config, head_dim)
    if not all(map(isfinite, (*frequencies, factor))):
        raise UserError("config.json describes a rope without finite frequencies")
    if 2 * len(frequencies) != head_dim:
        raise UserError(f"rope on {2 * len(frequencies)} of {head_dim} channels per head is not supported")
    layers = tuple(
        LayerConfig.attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config.intermediate_size,
            window=windows[index] if windows else None,
        )
        for index in range(config.num_hidden_layers)
    )
    return ModelConfig(
        architecture=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_positions=context_limit(config),
        norm_eps=config.rms_norm_eps,
        tied_head=bool(config.tie_word_embeddings),
        layers=layers,
        inverse_frequencies=frequencies,
        rope_factor=factor,
        source=vars(config),
    )


def layer_windows(config: Fields, window: int | None, first: int = 0) -> list[int | None]:
    """The window of each layer that slides: by `layer_types` where the configuration has them, else from `first` on.

    Raises:
        UserError: a layer of another type; more or fewer types than layers; no first layer.
    """
    if type(first) is not int:
        raise UserError(f"config.json has max_window_layers {first}, which must be a whole number")
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if index >= first else None for index in range(count)]
    if not isinstance(kinds, list | tuple):
        raise UserError(f"config.json has layer_types {kinds!r}, which must be a list")
    if len(kinds) != count:
        raise UserError(f"config.json has {len(kinds)} layer_types for {count} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(f"layers of type {kind!r} are not supported for {config.model_type}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


TENSORS: Mapping[str, str] = {
    "embedding": "model.embed_tokens",
    "mixer_norm": "model.layers.{}.input_layernorm",
    "query": "model.layers.{}.self_attn.q_proj",
    "key": "model.layers.{}.self_attn.k_proj",
    "value": "model.layers.{}.self_attn.v_proj",
    "query_norm": "model.layers.{}.self_attn.q_norm",
    "key_norm": "model.layers.{}.self_attn.k_norm",
    "attention_out": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""Llama's names of the pieces, `{}` standing for the layer."""


def stored_names(names: Mapping[str, str], config: ModelConfig, tensors: Tensors) -> Mapping[str, str]:
    """What a checkpoint calls the pieces, where it was saved from a part of the model, or stores what is tied once.

    transformers takes both: tensors without the prefix `model.`, and a head that is the embedding, too.
    """

    def stored(piece: str) -> bool:
        return f"{names[piece]}.weight" in tensors

    bare = {piece: name.removeprefix("model.") for piece, name in names.items()}
    if not stored("norm") and f"{bare['norm']}.weight" in tensors:
        names = bare
    if config.tied_head and not stored("embedding") and stored("head"):
        # Under its own name there is no head any more, so that it is tied.
        return {**names, "embedding": names["head"], "head": names["embedding"]}
    return names


def llama_pieces(
    config: ModelConfig,
    tensors: Tensors,
    *,
    biases: Literal["config", "qkv", "none"] = "config",
    head_norms: bool = False,
    names: Mapping[str, str] = TENSORS,
) -> Iterator[Pieces]:
    """The pieces of a Llama: those outside the layers, then layer by layer, read as they are asked for.

    Args:
        biases: which projections must have one: those that the configuration names (`attention_bias`,
            `mlp_bias`), or q, k and v. Others are taken where the checkpoint has them.
        head_norms: whether each head's queries and keys are normed.
        names: what the checkpoint calls the pieces (`TENSORS`).

    Raises:
        UserError: a tensor is missing, its shape is not what the configuration says, or norms of heads would hide that
            queries or keys overflow.
    """
    names = stored_names(names, config, tensors)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    attention_bias = biases == "config" and bool(config.source.get("attention_bias"))
    mlp_bias = biases == "config" and bool(config.source.get("mlp_bias"))

    def single(piece: str, *shape: int, layer: int = 0) -> Callable[[], Piece]:
        return lambda: tensors.piece([f"{names[piece].format(layer)}.weight"], [shape])

    def projection(layer: int, outs: Mapping[str, int], width: int, biased: bool) -> Callable[[], Piece]:
        called = [names[piece].format(layer) for piece in outs]
        weights, read = [f"{name}.weight" for name in called], tensors.stacked if biased else tensors.maybe_stacked

        def piece() -> Piece:
            bias = read([f"{name}.bias" for name in called], [(out,) for out in outs.values()])
            return tensors.piece(weights, [(out, width) for out in outs.values()], bias)

        return piece

    def require_squares(layer: int, shape: LayerConfig, entering: Tensor) -> None:
        """Norms of heads make zeros of queries and keys whose squares overflow. No row of the inputs is longer than
        sqrt(hidden) before its weights, so the lengths of the weights say whether that can be."""
        longest, width = entering.abs().amax().double() * hidden**0.5, shape.slots.key_width
        for piece, heads in (("query", shape.heads), ("key", shape.slots.heads)):
            name = names[piece].format(layer)
            called = tensors.called(f"{name}.weight")
            rows = tensors.get(f"{name}.weight", heads * width, hidden).double()
            added = tensors.maybe(f"{name}.bias", heads * width)
            most = float(rows.norm(dim=1).amax() * longest) + (0.0 if added is None else float(added.abs().amax()))
            # Half of what fits, for the roundings on the way.
            if 4 * most * most * width > torch.finfo(torch.promote_types(tensors.dtype, torch.float32)).max:
                raise UserError(f"{called} in {tensors.folder} is so large that what it computes overflows")

    outside = {"embedding": single("embedding", vocabulary, hidden), "norm": single("norm", hidden)}
    # A head of its own wins over the configuration's word that there is none, as in transformers.
    if not config.tied_head or f"{names['head']}.weight" in tensors:
        outside["head"] = single("head", vocabulary, hidden)
    yield Pieces(config, None, Stored(outside))
    for index, shape in enumerate(config.layers):
        head_dim = shape.slots.key_width
        width, kv_width = shape.heads * head_dim, shape.slots.heads * head_dim
        qkv = {"query": width, "key": kv_width, "value": kv_width}
        stored = {
            "mixer_norm": single("mixer_norm", hidden, layer=index),
            "qkv": projection(index, qkv, hidden, attention_bias or biases == "qkv"),
            "attention_out": projection(index, {"attention_out": hidden}, width, attention_bias),
            "mlp_norm": single("mlp_norm", hidden, layer=index),
            "gate_up": projection(index, {"gate": shape.ffn, "up": shape.ffn}, hidden, mlp_bias),
            "down": projection(index, {"down": hidden}, shape.ffn, mlp_bias),
        }
        if head_norms:
            stored |= {name: single(name, head_dim, layer=index) for name in ("query_norm", "key_norm")}
            require_squares(index, shape, stored["mixer_norm"]().weight)
        yield Pieces(config, index, Stored(stored))
