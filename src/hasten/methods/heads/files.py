"""Folders of trained heads: `config.json`, and tensors in safetensors or in a pickle that holds nothing but tensors."""

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
from hasten.model.checkpoint import read_json

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


def require_shape(file: Path, name: str, tensor: Tensor, *shape: int) -> None:
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


def read_accuracy(file: Path, config: Mapping[str, Any], count: int) -> tuple[tuple[float, ...], ...]:
    """Per level, how often each rank was right, as a configuration says it; empty where it does not.

    Args:
        file: of the configuration.
        count: levels.

    Raises:
        UserError: no shares, or of another number of levels.
    """
    given = config.get("accuracy", [])
    try:
        table = tuple(tuple(float(share) for share in ranks) for ranks in given)
    except (TypeError, ValueError):
        table = ((-1.0,),)
    if table and (len(table) != count or not all(0 <= share <= 1 for ranks in table for share in ranks)):
        raise UserError(f"{file}: accuracy must be shares, a list for each of {count} heads")
    return table


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: str = WEIGHTS) -> None:
    """Write a head's folder; the weights are whole before the configuration names them.

    Args:
        weights: name of their file.

    Raises:
        UserError: it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / weights) as fresh:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh)
    write_text(folder / CONFIG, dumps(config, indent=2) + "\n")
