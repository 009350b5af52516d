"""Responses that outlive their requests: an index per tenant, the oldest forgotten first, kept in a file if wanted.

The file is text: a first line that says what it is and whose tokens it holds, then one line per finished response. A
response is added by one write at the end; when most lines are forgotten responses, the file is written anew beside
the old one and replaces it. A last line that was cut off (a crash, a full disk) is dropped. It is as confidential as
the responses themselves: only its owner may read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.engine import Target
from hasten.errors import UserError
from hasten.methods.drafters.suffix_index import SuffixIndex

FORMAT = "hasten responses 1"


@dataclass
class _Response:
    """Where a response is, and whether it is complete."""

    tenant: str
    sequence: int
    finished: bool = False


class ResponseStore:
    """A bounded store of responses, finished and growing.

    Args:
        limits: responses kept, and their tokens, over all tenants. Growing ones count, but are never forgotten.
        depth: see `SuffixIndex`.
        path: the file, or None. It is read at once if it exists.
        target: whose tokens they are.

    Raises:
        UserError: the file is damaged, of another vocabulary, something else altogether, or cannot be read or written.
    """

    def __init__(self, limits: tuple[int, int], depth: int, path: Path | None, target: Target) -> None:
        self.limits, self.depth = limits, depth
        self._held = 0
        self._indices: dict[str, SuffixIndex] = {}
        self._responses: dict[int, _Response] = {}
        self._next = 0
        self._path = path
        self._lines = 0
        if path is not None:
            self._header = {"format": FORMAT, "vocabulary": _fingerprint(target)}
            self._read(path, target.model.config.vocab_size)

    def __len__(self) -> int:
        """Responses held."""
        return len(self._responses)

    @property
    def memory_bytes(self) -> int:
        return sum(index.memory_bytes for index in self._indices.values())

    def index(self, tenant: str) -> SuffixIndex | None:
        """What a tenant's requests may look up."""
        return self._indices.get(tenant)

    def open(self, tenant: str) -> int:
        """Begin a response; returns its number."""
        index = self._indices.setdefault(tenant, SuffixIndex(self.depth))
        number = self._next
        self._next += 1
        self._responses[number] = _Response(tenant, index.add())
        self._forget()
        return number

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        """Append tokens to a response; they can be looked up at once."""
        response = self._responses[number]
        self._indices[response.tenant].extend(response.sequence, tokens)
        self._held += len(tokens)

    def close(self, number: int) -> None:
        """A response is complete: keep it, unless it is empty."""
        response = self._responses[number]
        response.finished = True
        if self._tokens(response):
            self._write(response)
        else:
            self._drop(number)
        self._forget()

    def _tokens(self, response: _Response) -> list[int]:
        return self._indices[response.tenant].tokens(response.sequence)

    def _forget(self) -> None:
        """Drop the oldest complete responses that are too many."""
        while len(self._responses) > self.limits[0] or self._held > self.limits[1]:
            oldest = next((number for number, each in self._responses.items() if each.finished), None)
            if oldest is None:
                return
            self._drop(oldest)

    def _drop(self, number: int) -> None:
        response = self._responses.pop(number)
        index = self._indices[response.tenant]
        self._held -= len(self._tokens(response))
        index.remove(response.sequence)
        if not len(index):
            del self._indices[response.tenant]

    # The file

    def _read(self, path: Path, vocabulary: int) -> None:
        """Take the file's responses, or begin the file."""
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"suffix: the store {path} cannot be read: {_reason(error)}") from error
        if text is not None:
            self._take(text, vocabulary)
        try:
            self._rewrite(path)
        except OSError as error:
            raise UserError(f"suffix: the store {path} cannot be written: {_reason(error)}") from error

    def _take(self, text: str, vocabulary: int) -> None:
        """Add the responses of a file's text, the oldest first."""
        header, *lines = text.split("\n")
        found = _parsed(header)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"suffix: {self._path} is not a store of responses; name another file, or delete it")
        if found != self._header:
            raise UserError(f"suffix: the store {self._path} belongs to a model with other tokens; name another file")
        # Behind the last line end there is nothing, or a line that was cut off.
        for number, line in enumerate(lines[:-1], 2):
            entry = _parsed(line)
            if not _is_entry(entry, vocabulary):
                raise UserError(f"suffix: the store {self._path} is damaged in line {number}; mend or delete it")
            response = self.open(entry["tenant"])
            self.extend(response, entry["tokens"])
            self._responses[response].finished = True
        self._forget()

    def _write(self, response: _Response) -> None:
        """Add a response to the file; if that fails, say so once and go on without one."""
        if self._path is None:
            return
        try:
            if self._lines >= 2 * len(self._responses):
                self._rewrite(self._path)
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._line(response))
                self._lines += 1
        except OSError as error:
            warnings.warn(f"suffix: the store {self._path} is no longer written: {_reason(error)}", stacklevel=2)
            self._path = None

    def _rewrite(self, path: Path) -> None:
        """Write the whole file beside the old one, then replace it."""
        finished = [response for response in self._responses.values() if response.finished]
        temporary = path.with_name(path.name + ".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._header) + "\n")
            file.writelines(map(self._line, finished))
        os.replace(temporary, path)
        self._lines = len(finished)

    def _line(self, response: _Response) -> str:
        entry = {"tenant": response.tenant, "tokens": self._tokens(response)}
        return json.dumps(entry, separators=(",", ":")) + "\n"


def _fingerprint(target: Target) -> str:
    """Equal for models whose tokens mean the same: a digest of the tokenizer's vocabulary and of the number of ids."""
    tokens = sorted(target.tokenizer.get_vocab().items()) if target.tokenizer is not None else []
    return hashlib.sha256(json.dumps([target.model.config.vocab_size, tokens]).encode()).hexdigest()


def _parsed(line: str) -> Any:
    """A line's JSON value; None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_entry(entry: Any, vocabulary: int) -> bool:
    """Whether a parsed line is a response of this vocabulary."""
    if not isinstance(entry, dict) or not isinstance(entry.get("tenant"), str):
        return False
    tokens = entry.get("tokens")
    return isinstance(tokens, list) and all(type(token) is int and 0 <= token < vocabulary for token in tokens)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
