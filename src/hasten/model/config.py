"""What a checkpoint's configuration says, in the terms the engine uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Slots:
    """A layer keeps of each row a key [heads, key_width] and a value [heads, value_width]."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class SlotsOf:
    """A layer reads the slots that an earlier one keeps, and writes none."""

    layer: int


@dataclass(frozen=True)
class State:
    """A recurrent layer keeps tensors of these shapes behind the latest row; they cannot be cropped."""

    shapes: tuple[tuple[int, ...], ...]


Keeps = Slots | SlotsOf | State | None
"""What the cache keeps for a layer; None: nothing."""


@dataclass(frozen=True)
class LayerConfig:
    """Shape of one layer's mixer and MLP; layers of one model may differ.

    Attributes:
        heads: query heads.
        ffn: width of the MLP.
        keeps: what the cache keeps for it.
        window: a row at position p sees positions p-window+1 .. p; None means everything before it.
    """

    heads: int
    ffn: int
    keeps: Keeps
    window: int | None = None

    @classmethod
    def attention(cls, heads: int, kv_heads: int, head_dim: int, ffn: int, window: int | None = None) -> LayerConfig:
        """With keys and values of one width, for `kv_heads` heads (a divisor of `heads`)."""
        return cls(heads, ffn, Slots(kv_heads, head_dim, head_dim), window)

    @property
    def slots(self) -> Slots:
        """What a row leaves in the cache.

        Raises:
            TypeError: it leaves no keys and values.
        """
        if not isinstance(self.keeps, Slots):
            raise TypeError(f"a layer that keeps {self.keeps} has no slots of its own")
        return self.keeps


@dataclass(frozen=True)
class DiffusionConfig:
    """How a checkpoint was trained to fill masked positions. No configuration file lets one infer this.

    Attributes:
        attention: `full`: every position of the canvas sees every other one; `block-causal`: those of its own block
            and of earlier ones; `context-causal`: finished tokens see what is before them, as in an autoregressive
            model, the block under construction sees itself, too.
        alignment: whether a row predicts its own position (`same`) or the next one (`shifted`).
        mask_id: the token that stands where nothing is decided yet.
        block: positions per block it was trained with; None where the decoder may choose (`full` only).
    """

    attention: Literal["full", "block-causal", "context-causal"]
    alignment: Literal["same", "shifted"]
    mask_id: int
    block: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        architecture: the checkpoint's `model_type`.
        max_positions: the context limit in tokens.
        rope: inverse frequencies [head_dim / 2] and the factor that scales cos and sin, as lists so that the
            configuration stays hashable and printable.
        rope_axes: by which axis of a position each frequency turns, where positions have several; empty: by the first.
        source: the raw configuration, for fields only one architecture knows.
        diffusion: how it fills masked positions; None for an autoregressive model.
        end_ids: tokens that end a text beside those that the checkpoint's configurations name.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    norm_eps: float
    tied_head: bool
    layers: tuple[LayerConfig, ...]
    inverse_frequencies: tuple[float, ...]
    rope_factor: float = 1.0
    rope_axes: tuple[int, ...] = ()
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    diffusion: DiffusionConfig | None = None
    end_ids: tuple[int, ...] = ()

    @property
    def fills_canvas(self) -> bool:
        """Whether plain decoding fills masked positions. With context-causal attention it predicts the next token."""
        return self.diffusion is not None and self.diffusion.attention != "context-causal"
