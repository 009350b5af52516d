"""A GGUF file, mapped: what its header says, each count, length and offset checked against the file before it is used.

The `gguf` package has the format's names, sizes and arithmetic; its reader trusts the file, and takes seconds for a
vocabulary. Here nothing is read but the header, and nothing is taken that the file does not have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from hasten.errors import UserError
from hasten.model.checkpoint import GGUF_MAGIC

VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of tensors, where the file does not say another one."""
DIMENSIONS = 4
NAME_BYTES = 1024
"""The longest name of a key or tensor; the longest in use have some 50."""
STRINGS = 4_000_000
"""The longest list of strings: vocabularies have some 260,000 tokens, and twice as many merges."""

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
"""How the values of a type are spelt in `struct`, and in NumPy."""

PLAIN = ("F32", "F16", "BF16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
TYPES = (*PLAIN, *QUANTISED)
"""Types of weights that can be read."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        type: one of `TYPES`.
        shape: the longest stride first, as PyTorch has it; its rows lie one behind the other.
        offset: of its first byte in the file.
        row_bytes: of each row.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


class GGUF:
    """A file's metadata, and where its tensors are.

    Args:
        path: of the file.

    Attributes:
        metadata: values by key: numbers, truth values, text, lists of text, and arrays of numbers.
        tensors: by name.

    Raises:
        UserError: it cannot be read, is of a version or byte order that is not known, is damaged or cut off, is one
            part of several, or has tensors of a type that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Privately, so that PyTorch may have views of it; what is not read takes no memory.
            self._data = np.memmap(path, mode="c")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error if isinstance(error, OSError) else 'it is empty'}") from error
        self._bytes = self._data.data
        if self._bytes[: len(GGUF_MAGIC)] != GGUF_MAGIC:
            raise UserError(f"{path} is no GGUF file")
        self._place = len(GGUF_MAGIC)
        version = self._number("I", "its version")
        if version not in VERSIONS:
            order = ", or of another byte order" if version & 0xFFFF == 0 else ""
            known = " and ".join(map(str, VERSIONS))
            raise UserError(f"{path} is of GGUF version {version}{order}: only versions {known} are supported")
        count, keys = self._number("Q", "the number of tensors"), self._number("Q", "the number of keys")
        # A tensor takes 32 bytes of the header at least, a key 13.
        self._require_room(32 * count + 13 * keys, f"{count} tensors and {keys} keys")
        self.metadata = dict(self._unique(self._pairs(keys), "key"))
        self.tensors: dict[str, Stored] = dict(self._unique(self._infos(count), "tensor"))
        if self.whole("split.count", 1) > 1:
            raise UserError(f"{path} is one of {self.metadata['split.count']} parts: join them first (gguf-split)")

    def _pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        for _ in range(count):
            key = self._text("a key", NAME_BYTES)
            yield key, self._value(key)

    def _value(self, key: str) -> Any:
        kind = self._kind(key)
        if kind in SCALARS:
            return self._number(SCALARS[kind], key)
        if kind == GGUFValueType.STRING:
            return self._text(key)
        kind, count = self._kind(key), self._number("Q", key)
        if kind == GGUFValueType.STRING:
            if count > STRINGS:
                self._fail(f"{key} has {count} strings")
            self._require_room(8 * count, key)
            return self._texts(count, key)
        if kind not in SCALARS:
            self._fail(f"{key} is a list of lists")
        item = np.dtype(SCALARS[kind]).newbyteorder("<")
        start = self._advance(count * item.itemsize, key)
        return self._data[start : self._place].view(np.ndarray).view(item)

    def _kind(self, key: str) -> GGUFValueType:
        number = self._number("I", key)
        try:
            return GGUFValueType(number)
        except ValueError:
            self._fail(f"{key} is of type {number}, which does not exist")

    def _infos(self, count: int) -> Iterator[tuple[str, Stored]]:
        read = [self._info() for _ in range(count)]
        alignment = self.whole("general.alignment", ALIGNMENT)
        if alignment < 8 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment}, no power of two from 8 on")
        start = self._place + -self._place % alignment
        end, before = start, "the header"
        for name, kind, shape, row_bytes, offset in sorted(read, key=lambda each: each[-1]):
            stored = Stored(kind, shape, start + offset, row_bytes)
            if offset % alignment:
                self._fail(f"{name} lies at {offset}, which is not aligned to {alignment}")
            if stored.offset < end:
                self._fail(f"{name} overlaps with {before}")
            end, before = stored.offset + stored.nbytes, name
            if end > self._data.size:
                self._fail(f"{name} ends at {end}, but the file at {self._data.size}")
            yield name, stored

    def _info(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, bytes per row and offset of the next tensor."""
        name = self._text("the name of a tensor", NAME_BYTES)
        dimensions = self._number("I", name)
        if not 1 <= dimensions <= DIMENSIONS:
            self._fail(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("Q", name) for _ in range(dimensions))[::-1]
        number, offset = self._number("I", name), self._number("Q", name)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            self._fail(f"{name} is of type {number}, which does not exist")
        if kind.name not in TYPES:
            known = ", ".join(TYPES)
            raise UserError(f"{name} in {self.path} is {kind.name}, which is not supported; supported are {known}")
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % per_block:
            self._fail(f"{name} is {list(shape)}, which {kind.name} in blocks of {per_block} cannot be")
        return name, kind.name, shape, shape[-1] // per_block * block_bytes, offset

    def _unique(self, pairs: Iterator[tuple[str, Any]], what: str) -> Iterator[tuple[str, Any]]:
        seen = set()
        for name, value in pairs:
            if name in seen:
                self._fail(f"it has the {what} {name} twice")
            seen.add(name)
            yield name, value

    def _number(self, spelling: str, what: str) -> Any:
        start = self._advance(struct.calcsize(spelling), what)
        return struct.unpack_from(f"<{spelling}", self._bytes, start)[0]

    def _text(self, what: str, longest: int | None = None) -> str:
        length = self._number("Q", what)
        if longest is not None and length > longest:
            self._fail(f"{what} has {length} bytes")
        start = self._advance(length, what)
        try:
            return str(self._bytes[start : self._place], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is no UTF-8 text")

    def _texts(self, count: int, what: str) -> list[str]:
        """As many times `_text`, for the hundred thousand of a vocabulary."""
        found, data, end, place = [], self._bytes, self._data.size, self._place
        length = struct.Struct("<Q")
        for _ in range(count):
            start = place + length.size
            if start > end or (place := start + length.unpack_from(data, place)[0]) > end:
                self._fail(f"the file ends within {what}")
            try:
                found.append(str(data[start:place], "utf-8"))
            except UnicodeDecodeError:
                self._fail(f"{what} is no UTF-8 text")
        self._place = place
        return found

    def _advance(self, size: int, what: str) -> int:
        """Step over so many bytes, and say where they begin."""
        self._require_room(size, what)
        self._place += size
        return self._place - size

    def _require_room(self, size: int, what: str) -> None:
        if size > self._data.size - self._place:
            self._fail(f"the file ends within {what}")

    def _fail(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path} is damaged or cut off: {reason}")

    def rows(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor [rows, bytes per row]: the mapped file itself."""
        stored = self.tensors[name]
        flat = self._data[stored.offset : stored.offset + stored.nbytes].view(np.ndarray)
        return flat.reshape(-1, stored.row_bytes)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0.

        Raises:
            UserError: it is something else, or missing where there is no default.
        """
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self._refuse(key, value, "a whole number of at least 0")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number. As `whole`."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
            self._refuse(key, value, "a finite number")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """As `whole`."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self._refuse(key, value, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """As `whole`."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of text. As `whole`."""
        value = self._get(key, None)
        if not isinstance(value, list):
            self._refuse(key, value, "a list of text")
        return value

    def numbers(self, key: str) -> list[Any]:
        """A list of finite numbers. As `whole`."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.dtype == bool or not np.isfinite(value).all():
            self._refuse(key, value, "a list of finite numbers")
        numbers: list[Any] = value.tolist()
        return numbers

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no {key} among its metadata")
        return value

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        shown = f"a list of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:80]
        raise UserError(f"{self.path} has {key} {shown}, which must be {wanted}")


def open_gguf(path: Path) -> GGUF:
    """A file as it is now. The one asked for last is not read again.

    Raises:
        UserError: as `GGUF` says.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return _opened(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _opened(path: Path, written: int, size: int) -> GGUF:
    return GGUF(path)
