"""What a checkpoint's `quantization_config` says. No such format is read yet; each is refused by what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UserError

BITS = ("bits", "w_bit", "num_bits", "weight_bits", "nbits")
GROUP = ("group_size", "q_group_size", "weight_block_size")
KEPT = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "exclude")
"""Fields by which methods call the same things."""


@dataclass(frozen=True)
class Quantization:
    """How weights were quantised.

    Attributes:
        method: as the configuration spells it.
        bits: of a weight; None where it does not say.
        group: how many weights share a scale, as it says it ("128", "[128, 128]"); None where it is a whole row or
            column, or unsaid.
        kept: modules that were not converted.
    """

    method: str
    bits: int | None = None
    group: str | None = None
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As "gptq, 4 bits in groups of 128, all but lm_head"."""
        said = self.method
        said += "" if self.bits is None else f", {self.bits} bits"
        said += "" if self.group is None else f" in groups of {self.group}"
        if self.kept:
            more = f" and {len(self.kept) - 1} more" if len(self.kept) > 1 else ""
            said += f", all but {self.kept[0]}{more}"
        return said


def read_quantization(section: object) -> Quantization | None:
    """What a `quantization_config` says; None where it says that nothing is quantised.

    Raises:
        UserError: it is no section (an object).
    """
    if not section:
        return None
    if not isinstance(section, dict):
        raise UserError('config.json has a field "quantization_config" that is no section (an object)')
    said, four_or_eight = _weights(section), _bits_and_bytes(section)
    bits, group = _first(said, BITS), _first(said, GROUP)
    bits = bits if type(bits) is int else four_or_eight
    method = section.get("quant_method") or ("bitsandbytes" if four_or_eight else "none")
    if str(method).lower() == "none":
        if bits is None:
            return None
        method = "a method without a name"
    kept = _first(section, KEPT)
    return Quantization(
        method=str(method),
        bits=bits,
        group=None if group in (None, -1) else str(group),
        kept=tuple(map(str, kept)) if isinstance(kept, list) else (),
    )


def _first(section: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((section[name] for name in names if section.get(name) is not None), None)


def _bits_and_bytes(section: Mapping[str, Any]) -> int | None:
    """Bits as bitsandbytes says them, which wrote no method once."""
    return 4 if section.get("load_in_4bit") else 8 if section.get("load_in_8bit") else None


def _weights(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where bits and groups stand: of compressed-tensors in its first group of modules."""
    groups = section.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else section
