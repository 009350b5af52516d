"""Hugging Face checkpoints: find the folder, read its configuration, hand out its tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt"]
UNWANTED_FILES = ["*/*", "consolidated*"]
"""The same weights again, in other formats."""


def one_line(error: Exception) -> str:
    """An error's message, as the end of a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def shipped() -> list[str]:
    """Names of the models that come with hasten."""
    return sorted(folder.name for folder in ASSETS.glob("*/") if (folder / "config.json").exists())


def resolve(model: str | Path) -> Path:
    """The local folder of a model.

    Args:
        model: a folder, the name of a shipped model, or a hub id (downloaded, or found in the hub's cache).

    Raises:
        UserError: it is none of these, or the download fails.
    """
    name = str(model)
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        occupied = folder.exists()
    except (OSError, ValueError, RuntimeError):
        # No path at all: too long, a null character, an unknown ~user.
        occupied = True
    if name in shipped():
        return ASSETS / name
    if occupied or name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = f"none of the shipped models ({', '.join(shipped())})"
        raise UserError(f"no checkpoint at {name!r}: no folder, no hub id such as 'owner/name', {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES))
    except Exception as error:
        # The hub's errors, its HTTP library's and the system's have no common base.
        raise UserError(f"cannot get {name!r} from the hub: {one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder.

    Raises:
        UserError: missing, unreadable or not an object.
    """
    if path.exists() and not path.is_file():
        # A pipe would be waited for.
        raise UserError(f"cannot read {path}: it is no file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}: it is not a Hugging Face checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as a checkpoint's index has it; None where one file holds them all.

    Raises:
        UserError: no weights, an index that is not usable, or one that names a file outside the folder.
    """
    if (folder / SINGLE).exists():
        return None
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} has no {SINGLE} (or {INDEX} with its shards)")
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
    for file in files.values():
        # The name counts, not where a link leads: the hub's cache keeps files elsewhere.
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise UserError(f"{folder / INDEX} names a file outside its folder: {file}")
    return files


def weight_file(folder: Path, name: str) -> Path:
    """One of the files that hold a checkpoint's tensors.

    Raises:
        UserError: it is missing, or no file.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} misses the shard {name}, or it is no file")
    return path


def weight_bytes(folder: Path) -> int:
    """Size of the files that hold a checkpoint's tensors; others beside them do not count.

    Raises:
        UserError: as `weight_map` and `weight_file` say.
    """
    files = weight_map(folder)
    names = {SINGLE} if files is None else set(files.values())
    return sum(weight_file(folder, name).stat().st_size for name in names)


def tensor_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Of all tensors that a checkpoint's files have, without reading them; none where files are missing or corrupt."""
    shapes: list[tuple[int, ...]] = []
    try:
        files = weight_map(folder)
        for name in {SINGLE} if files is None else set(files.values()):
            with safe_open(weight_file(folder, name), framework="pt", device="cpu") as file:
                shapes += [tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()]  # noqa: SIM118
    except (UserError, SafetensorError, OSError):
        return []
    return shapes


class Tensors:
    """The tensors of a folder's safetensors files, read one by one, cast and moved as they are read.

    Args:
        folder: with `model.safetensors`, or an index and its shards.
        dtype, device: what the tensors become.

    Raises:
        UserError: files missing or corrupt.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self._open: dict[str, Any] = {}
        where = weight_map(folder)
        self._where = dict.fromkeys(self._file(SINGLE).keys(), SINGLE) if where is None else where

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = weight_file(self.folder, name)
            try:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is corrupt: {one_line(error)}") from error
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str, *shape: int) -> Tensor:
        """A tensor by name, all of it finite; where a shape is given, it must be that.

        Raises:
            UserError: the checkpoint has no such tensor or one of another shape, its shard is corrupt, or it holds NaN
                or infinity, in the file or once it is cast.
        """
        if name not in self._where:
            raise UserError(f"the checkpoint in {self.folder} has no tensor {name}")
        try:
            tensor: Tensor = self._file(self._where[name]).get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / self._where[name]} is corrupt: {one_line(error)}") from error
        if shape and tensor.shape != shape:
            found = list(tensor.shape)
            raise UserError(f"{name} in {self.folder} is {found}, but its config.json asks for {list(shape)}")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} in {self.folder} is {kind}: quantised checkpoints are not supported")
        cast = tensor.to(device=self.device, dtype=self.dtype)
        # The least and the largest are NaN where anything is: one pass, without a copy.
        if not all(map(isfinite, cast.aminmax())):
            if tensor.isfinite().all():
                kind = str(self.dtype).removeprefix("torch.")
                raise UserError(f"{name} in {self.folder} overflows in {kind}: its largest weights become infinite")
            raise UserError(f"{name} in {self.folder} holds NaN or infinity: the checkpoint is damaged")
        return cast

    def maybe(self, name: str, *shape: int) -> Tensor | None:
        """A tensor that may be absent (biases)."""
        return self.get(name, *shape) if name in self else None

    def stacked(self, names: list[str], shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        """Several tensors joined along their first axis; where their shapes are given, they must be those."""
        return torch.cat(
            [self.get(name, *shape) for name, shape in zip(names, shapes or [()] * len(names), strict=True)]
        )

    def maybe_stacked(self, names: list[str], shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor | None:
        """As `stacked`, or None where all are absent."""
        return self.stacked(names, shapes) if any(name in self for name in names) else None
