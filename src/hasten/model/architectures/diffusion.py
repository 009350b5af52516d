"""How a configuration says that its model fills masked positions: what is known of its architecture, and a section.

Any architecture becomes a diffusion model by a section of config.json, which also overrides what is known:

    "diffusion": {"attention": "context-causal", "alignment": "shifted", "mask_token_id": 7, "block_length": 32}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from hasten.errors import UserError
from hasten.model.config import DiffusionConfig, ModelConfig

HINTS = get_type_hints(DiffusionConfig)
CHOICES: Mapping[str, tuple[str, ...]] = {name: get_args(HINTS[name]) for name in ("attention", "alignment")}
WANTED: Mapping[str, str] = {
    **{name: " or ".join(choices) for name, choices in CHOICES.items()},
    "mask_token_id": "the token that stands for a masked position",
    "block_length": "positions per block",
}
"""The section's keys, and what is to be written there."""


def read_diffusion(config: ModelConfig, known: Mapping[str, Any], section: object) -> DiffusionConfig | None:
    """How a model fills masked positions; None for an autoregressive model.

    Args:
        config: the model itself.
        known: what its architecture, and the fields that this architecture has, say; keys as in the section.
        section: `diffusion` of config.json; None where there is none.

    Raises:
        UserError: something is missing, unknown or impossible; nothing is guessed.
    """
    if section is None and not known:
        return None
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise UserError('config.json has a field "diffusion" that is no section (an object)')
    if unknown := section.keys() - WANTED.keys():
        keys = ", ".join(WANTED)
        raise UserError(f'the section "diffusion" of config.json has {min(unknown)!r}; its keys are {keys}')
    given = {name: value for source in (known, section) for name, value in source.items() if value is not None}
    for name, choices in CHOICES.items():
        if given.get(name, choices[0]) not in choices:
            raise UserError(f"config.json has {name} {given[name]!r}, which must be {WANTED[name]}")
    optional = {"block_length"} if given.get("attention") == "full" else set()
    if missing := [f"{name} ({hint})" for name, hint in WANTED.items() if name not in given.keys() | optional]:
        fields = ", ".join(missing)
        raise UserError(
            f"config.json leaves open how this {config.architecture} model fills masked positions: "
            f'write {fields} into its section "diffusion"'
        )
    mask_id, block = given["mask_token_id"], given.get("block_length")
    if type(mask_id) is not int or not 0 <= mask_id < config.vocab_size:
        raise UserError(
            f"the mask token {mask_id} of this {config.architecture} model is outside its vocabulary of "
            f'{config.vocab_size}: write mask_token_id into the section "diffusion" of config.json'
        )
    if block is not None and (type(block) is not int or block < 1):
        raise UserError(f"the model's block has {block} positions, which must be a whole number of at least 1")
    if any(layer.window is not None for layer in config.layers):
        raise UserError("config.json has a sliding window, which is not supported for diffusion models")
    return DiffusionConfig(given["attention"], given["alignment"], mask_id, block)
