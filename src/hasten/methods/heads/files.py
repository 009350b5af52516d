"""Folders of trained heads: `config.json`, and tensors in safetensors or in a pickle that holds nothing but tensors.

A matrix may be stored as blocks: `NAME.q8_0` or `NAME.q4_1`, uint8 [outputs, bytes per row], stands for `NAME`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import replacing, write_text, writing
from hasten.methods.heads.pieces import ROUNDED, of_blocks, require_finite
from hasten.model.checkpoint import read_json
from hasten.model.weights import Piece

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        UserError: it cannot be read, holds something else, or not a number.
    """
    try:
        if file.suffix == ".safetensors":
            tensors: Any = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
            raise TypeError("no dictionary of tensors")
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, TypeError, EOFError, KeyError) as error:
        raise UserError(f"cannot read {file}: it is damaged, or no file of tensors") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds NaN or infinity: the file is damaged")
    return tensors


def read_pieces(file: Path) -> dict[str, Piece]:
    """All tensors of a file by name; those in blocks stay as they are stored.

    Raises:
        UserError: it cannot be read, holds something else, not a number, or one tensor twice.
    """
    pieces: dict[str, Piece] = {}
    for name, tensor in read_tensors(file).items():
        plain, _, store = name.rpartition(".")
        if store in ROUNDED:
            require_finite(f"{file}: {name}", ROUNDED[store], tensor)
            piece = of_blocks(ROUNDED[store], tensor)
        else:
            plain, piece = name, Piece(tensor)
        if plain in pieces:
            raise UserError(f"{file} has {plain} more than once")
        pieces[plain] = piece
    return pieces


def require_names(file: Path, tensors: Iterable[str], wanted: Iterable[str]) -> None:
    """Compare names with those that a format has.

    Raises:
        UserError: some are missing, or too many.
    """
    have, want = set(tensors), set(wanted)
    if missing := sorted(want - have):
        raise UserError(f"{file} has no {', '.join(missing[:3])}")
    if strange := sorted(have - want):
        raise UserError(f"{file} has {', '.join(strange[:3])}, which such heads do not have")


def require_shape(file: Path, name: str, tensor: Tensor | Piece, *shape: int) -> None:
    """Compare a tensor's shape with what it must be.

    Raises:
        UserError: it is another one.
    """
    if tuple(tensor.shape) != shape:
        raise UserError(f"{file}: {name} is {list(tensor.shape)}, and must be {list(shape)}")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration beside the weights; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    file = folder / CONFIG
    return read_json(file) if file.exists() else {}


def read_words(file: Path, words: Tensor | None, vocabulary: int) -> Tensor | None:
    """`token_map`: int64, the token of each row of a head that says only some; None where it says all.

    Raises:
        UserError: no ascending ids of the vocabulary.
    """
    if words is None:
        return None
    ascending = words.ndim == 1 and words.dtype == torch.int64 and bool((words[1:] > words[:-1]).all())
    if not ascending or not len(words) or int(words[0]) < 0 or int(words[-1]) >= vocabulary:
        raise UserError(f"{file}: token_map must be ascending ids below {vocabulary}")
    return words


def read_accuracy(file: Path, config: Mapping[str, Any], count: int) -> tuple[tuple[float, ...], ...]:
    """Of each head, how often each rank was right; empty where the configuration beside a file does not say it.

    Raises:
        UserError: it says something else.
    """
    given = config.get("accuracy", [])
    try:
        table = tuple(tuple(float(share) for share in ranks) for ranks in given)
    except (TypeError, ValueError):
        table = ((-1.0,),)
    if table and (len(table) != count or not all(0 <= share <= 1 for ranks in table for share in ranks)):
        raise UserError(f"{file.with_name(CONFIG)}: accuracy must be shares, a list for each of {count} heads")
    return table


def save(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor | Piece], weights: str = WEIGHTS
) -> None:
    """Write a head's folder; the weights are whole before the configuration names them.

    Args:
        weights: name of their file.

    Raises:
        UserError: it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / weights) as fresh:
        save_file(dict(_written(name, tensor) for name, tensor in tensors.items()), fresh)
    write_text(folder / CONFIG, dumps(config, indent=2) + "\n")


def _written(name: str, tensor: Tensor | Piece) -> tuple[str, Tensor]:
    """As the file has it. A piece's bias is a tensor of its own."""
    if isinstance(tensor, Piece) and tensor.stored:
        (blocks,) = tensor.stored
        return f"{name}.{blocks.type.lower()}", blocks.rows.contiguous()
    return name, (tensor.weight if isinstance(tensor, Piece) else tensor).contiguous()
