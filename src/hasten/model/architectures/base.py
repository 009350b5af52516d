"""The registry of architectures, and what the Llama family shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import SimpleNamespace
from typing import Any, Literal

import torch

from hasten.errors import UserError
from hasten.model.checkpoint import Tensors
from hasten.model.config import LayerConfig, ModelConfig
from hasten.model.decoder import Backend, Decoder
from hasten.model.layers import Attention, GatedMLP, Layer, RMSNorm, Rotary
from hasten.model.linear import Linear

Fields = SimpleNamespace
"""A configuration's fields as attributes. transformers' configurations have the same ones; importing them takes longer
than importing PyTorch."""


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` is read: configuration, then weights.

    Attributes:
        defaults: fields that config.json may leave out, with the values that transformers gives them.
    """

    name: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    build: Callable[[ModelConfig, Tensors, Backend, torch.dtype], Decoder]

    def fields(self, raw: Mapping[str, Any]) -> Fields:
        """A config.json with this architecture's defaults, and its rope as transformers 5 writes it.

        Raises:
            UserError: its rope is not the same for all layers.
        """
        values = {**DEFAULTS, **self.defaults, **raw}
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

FIXED_ROPES = ("default", "linear", "llama3", "yarn")


def rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of a configuration, also of an older one (`rope_scaling`, and `rope_theta` beside it).

    Raises:
        UserError: layers differ in their rope.
    """
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
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
    """Inverse frequencies and attention factor of the configuration's rope (default, linear, llama3, yarn).

    The formulas are transformers' own, so scaled variants agree with it by construction.

    Raises:
        UserError: a rope whose frequencies change with the sequence length, or an unknown one.
    """
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in FIXED_ROPES:
        raise UserError(f"rope type {kind!r} is not supported; supported are {', '.join(FIXED_ROPES)}")
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


def read_llama_family(config: Fields, windows: list[int | None] | None = None) -> ModelConfig:
    """The fields that Llama, Mistral and Qwen share; `windows` has one entry per layer.

    Raises:
        UserError: a field is missing or makes no sense.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"activation {config.hidden_act!r} is not supported for {config.model_type}; only silu is")
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in SIZES}
    sizes |= {name: size for name in OPTIONAL_SIZES if (size := getattr(config, name, None)) is not None}
    sizes["sliding_window"] = min((window for window in windows or () if window is not None), default=1)
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"config.json has {name} {size}, which must be a whole number of at least 1")
    if not isinstance(config.rms_norm_eps, int | float):
        raise UserError(f"config.json has rms_norm_eps {config.rms_norm_eps}, which must be a number")
    heads = config.num_attention_heads
    kv_heads = sizes.get("num_key_value_heads", heads)
    head_dim = sizes.get("head_dim", config.hidden_size // heads)
    if heads % kv_heads:
        raise UserError(f"config.json has {heads} heads, which {kv_heads} key/value heads cannot share evenly")
    frequencies, factor = rotary_frequencies(config, head_dim)
    if not all(map(isfinite, frequencies)):
        raise UserError("config.json describes a rope without finite frequencies")
    if 2 * len(frequencies) != head_dim:
        raise UserError(f"rope on {2 * len(frequencies)} of {head_dim} channels per head is not supported")
    layers = tuple(
        LayerConfig(
            kind="attention",
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
        max_positions=config.max_position_embeddings,
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
        UserError: a layer of another type; more or fewer types than layers.
    """
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if index >= first else None for index in range(count)]
    if len(kinds) != count:
        raise UserError(f"config.json has {len(kinds)} layer_types for {count} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(f"layers of type {kind!r} are not supported for {config.model_type}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def build_llama_family(
    config: ModelConfig,
    tensors: Tensors,
    backend: Backend,
    cache_dtype: torch.dtype,
    *,
    biases: Literal["config", "qkv", "none"] = "config",
    head_norms: bool = False,
) -> Decoder:
    """Pieces from Llama-style tensor names.

    Args:
        biases: which projections must have one: those that the configuration names (`attention_bias`,
            `mlp_bias`), or q, k and v. Others are taken where the checkpoint has them.
        head_norms: whether each head's queries and keys are normed.

    Raises:
        UserError: a tensor is missing, or its shape is not what the configuration says.
    """
    frequencies = torch.tensor(config.inverse_frequencies, dtype=torch.float32, device=tensors.device)
    if tensors.dtype == torch.float64:
        frequencies = frequencies.double()
    rotary = Rotary(frequencies, config.rope_factor)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    attention_bias = biases == "config" and bool(config.source.get("attention_bias"))
    mlp_bias = biases == "config" and bool(config.source.get("mlp_bias"))

    def norm(name: str, width: int) -> RMSNorm:
        return RMSNorm(tensors.get(name, width), config.norm_eps)

    def projection(names: list[str], outs: list[int], width: int, biased: bool) -> Linear:
        weight = tensors.stacked([f"{name}.weight" for name in names], [(out, width) for out in outs])
        read = tensors.stacked if biased else tensors.maybe_stacked
        return backend.linear(weight, read([f"{name}.bias" for name in names], [(out,) for out in outs]))

    embedding = tensors.get("model.embed_tokens.weight", vocabulary, hidden)
    layers = []
    for index, shape in enumerate(config.layers):
        prefix = f"model.layers.{index}"
        mixer, width, kv_width = (
            f"{prefix}.self_attn",
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        )
        attention = Attention(
            shape,
            qkv=projection(
                [f"{mixer}.{part}_proj" for part in "qkv"],
                [width, kv_width, kv_width],
                hidden,
                attention_bias or biases == "qkv",
            ),
            out=projection([f"{mixer}.o_proj"], [hidden], width, attention_bias),
            rotary=rotary,
            query_norm=norm(f"{mixer}.q_norm.weight", shape.head_dim) if head_norms else None,
            key_norm=norm(f"{mixer}.k_norm.weight", shape.head_dim) if head_norms else None,
        )
        mlp = GatedMLP(
            gate_up=projection(
                [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up")], [shape.ffn] * 2, hidden, mlp_bias
            ),
            down=projection([f"{prefix}.mlp.down_proj"], [hidden], shape.ffn, mlp_bias),
        )
        layers.append(
            Layer(
                index,
                norm(f"{prefix}.input_layernorm.weight", hidden),
                attention,
                norm(f"{prefix}.post_attention_layernorm.weight", hidden),
                mlp,
            )
        )
    # A head of its own wins over the configuration's word that there is none, as in transformers.
    tied = config.tied_head and "lm_head.weight" not in tensors
    head = embedding if tied else tensors.get("lm_head.weight", vocabulary, hidden)
    return Decoder(
        config=config,
        embedding=embedding,
        layers=layers,
        norm=norm("model.norm.weight", hidden),
        head=backend.head_linear(head),
        backend=backend,
        cache_dtype=cache_dtype,
    )
