"""Checkpoints: find the folder or file, read a folder's configuration, hand out its tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.catalogue.entries import CATALOGUE, located, shipped
from hasten.errors import UserError, one_line
from hasten.model.weights import Piece

GGUF_MAGIC, GGUF_SUFFIX = b"GGUF", ".gguf"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt"]
UNWANTED_FILES = ["*/*", "consolidated*"]
"""The same weights again, in other formats."""


def is_gguf(path: Path) -> bool:
    """Whether there is a file that is taken for GGUF: by its name, or by how it begins."""
    if not path.is_file():
        return False
    if path.suffix.lower() == GGUF_SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def resolve(model: str | Path) -> Path:
    """Where a model lies: a folder, or a GGUF file.

    Args:
        model: a folder, a GGUF file, the name of a model that ships or was pulled, or a hub id (downloaded, or found in
            the hub's cache).

    Raises:
        UserError: it is none of these, it is still to be pulled, or the download fails.
    """
    name = str(model)
    try:
        folder = Path(model).expanduser()
        if folder.is_dir() or is_gguf(folder):
            return folder
        occupied = folder.exists()
    except (OSError, ValueError, RuntimeError):
        # No path at all: too long, a null character, an unknown ~user.
        occupied = True
    known = located(name)
    if known is not None:
        return known
    if occupied or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.lower().endswith(GGUF_SUFFIX):
        names = f"none of the shipped models ({', '.join(shipped())}), none to pull ({', '.join(CATALOGUE)})"
        raise UserError(f"no checkpoint at {name!r}: no folder, no GGUF file, no hub id such as 'owner/name', {names}")
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
    """Size of the files that hold a checkpoint's tensors, or of a GGUF file; others beside them do not count.

    Raises:
        UserError: as `weight_map` and `weight_file` say.
    """
    if folder.is_file():
        return folder.stat().st_size
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

    Attributes:
        expanded: weights that were stored in fewer bits, and expanded to be read, with their types.

    Raises:
        UserError: files missing or corrupt.
    """

    described_by = "config.json"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.expanded: dict[str, str] = {}
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

    def called(self, name: str) -> str:
        """What the checkpoint calls a tensor."""
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return tuple(self._stored(name, "get_slice").get_shape())

    def _read(self, name: str) -> Tensor:
        """A tensor that is there."""
        tensor: Tensor = self._stored(name, "get_tensor")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} in {self.folder} is {kind}: quantised checkpoints are not supported")
        return tensor

    def _stored(self, name: str, method: str) -> Any:
        try:
            return getattr(self._file(self._where[name]), method)(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / self._where[name]} is corrupt: {one_line(error)}") from error

    def require(self, name: str, *shape: int) -> None:
        """Refuse what is missing, or, where a shape is given, of another one.

        Raises:
            UserError: with the tensor's name and what it is.
        """
        if name not in self:
            raise UserError(f"the checkpoint in {self.folder} has no tensor {self.called(name)}")
        if shape and self.shape(name) != shape:
            found = list(self.shape(name))
            raise UserError(
                f"{self.called(name)} in {self.folder} is {found}, but its {self.described_by} asks for {list(shape)}"
            )

    def get(self, name: str, *shape: int) -> Tensor:
        """A tensor by name, all of it finite; where a shape is given, it must be that.

        Raises:
            UserError: the checkpoint has no such tensor or one of another shape, its shard is corrupt, or it holds NaN
                or infinity, in the file or once it is cast.
        """
        self.require(name, *shape)
        tensor, called = self._read(name), self.called(name)
        cast = tensor.to(device=self.device, dtype=self.dtype)
        # The least and the largest are NaN where anything is: one pass, without a copy.
        if not all(map(isfinite, cast.aminmax())):
            if tensor.isfinite().all():
                kind = str(self.dtype).removeprefix("torch.")
                raise UserError(f"{called} in {self.folder} overflows in {kind}: its largest weights become infinite")
            raise UserError(f"{called} in {self.folder} holds NaN or infinity: the checkpoint is damaged")
        return cast

    def piece(self, names: list[str], shapes: Sequence[tuple[int, ...]], bias: Tensor | None = None) -> Piece:
        """Tensors joined along their first axis, as a piece of the model.

        Raises:
            UserError: as `get`.
        """
        if len(names) == 1:
            return Piece(self.get(names[0], *shapes[0]), bias)
        return Piece(self.stacked(names, shapes), bias)

    def maybe(self, name: str, *shape: int) -> Tensor | None:
        """A tensor that may be absent (biases)."""
        return self.get(name, *shape) if name in self else None

    def stacked(self, names: list[str], shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        """Several tensors joined along their first axis; where their shapes are given, they must be those."""
        parts = [self.get(name, *shape) for name, shape in zip(names, shapes or [()] * len(names), strict=True)]
        # One alone is not copied.
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def maybe_stacked(self, names: list[str], shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor | None:
        """As `stacked`, or None where all are absent."""
        return self.stacked(names, shapes) if any(name in self for name in names) else None
