"""Hidden states of a target along its dialogues, read once and kept in a file: heads then train without the target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import megabytes, write_text, writing
from hasten.llm import LLM
from hasten.model import Rows, Taps
from hasten.model.checkpoint import read_json
from hasten.model.taps import Site
from hasten.train.heads.dialogues import Dialogue
from hasten.train.settings import differences

Tap = tuple[Site, int]
ROWS_OF_PASS = 2048
"""Dialogues share passes of so many rows."""
WITHIN = "within"
"""Said beside a file that is not there: which one has its states among others."""


@dataclass(frozen=True)
class States:
    """What training reads, one dialogue's rows behind the other's.

    Attributes:
        tokens: int64 [rows].
        answers: bool [rows], whether a token is the model's own: part of an answer.
        bounds: [dialogues + 1], where each dialogue begins, and where the last one ends.
        held: bfloat16 [rows, all taps, hidden], mapped from the file.
        columns: which of its taps are wanted, in their order.
    """

    tokens: Tensor
    answers: Tensor
    bounds: list[int]
    held: Tensor
    columns: list[int]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, rows: slice) -> Tensor:
        """bfloat16 [rows, taps, hidden] of some rows, read from the file."""
        return self.held[rows][:, self.columns]


def read_states(
    llm: LLM,
    dialogues: Sequence[Dialogue],
    taps: Sequence[Tap],
    file: Path,
    most: int,
    report: Callable[[int], None] = lambda done: None,
) -> States:
    """Read as many of the dialogues as fit, or the rest of those that an interrupted run left unread.

    Where another file in the folder has these states among more of the same rows, nothing is read: it serves in the
    place of one of their own, as what stands beside it then says (`within`).

    Args:
        llm: the target.
        taps: hidden states to keep of every row.
        file: of bfloat16 numbers; beside it stands what it was made of, with `.json` behind its name.
        most: bytes that it may have, or would have; what is there already stays, though there be more of it.
        report: told how many dialogues were read, those of an earlier run included.

    Raises:
        UserError: not even two dialogues fit; the file was made of something else, or cannot be written.
    """
    size, ends = 2 * len(taps) * llm.model.config.hidden_size, [*accumulate(len(each.ids) for each in dialogues)]
    origins = _Origins(llm, dialogues)
    _check(origins, taps, file)
    present = file.stat().st_size // size if file.exists() else 0
    done = sum(end <= present for end in ends)
    # What an earlier run had room for stays.
    count = max(done, sum(end * size <= most for end in ends))
    if count < 2:
        raise UserError(f"{megabytes(most)} are too few for the hidden states of two dialogues")
    kept, bounds = dialogues[:count], [0, *ends[:count]]
    own = origins.of_first(count, taps)
    if done < len(kept) and (within := _serving(origins, taps, bounds[-1], file)):
        file.unlink(missing_ok=True)
        write_text(_told(file), dumps({**own, WITHIN: within}, indent=2) + "\n")
        report(len(kept))
        return open_states(file, kept)
    write_text(_told(file), dumps(own, indent=2) + "\n")
    report(done)
    with writing(file), file.open("r+b" if file.exists() else "wb") as stream:
        # What a kill left of a pass is read again.
        stream.truncate(bounds[done] * size)
        stream.seek(bounds[done] * size)
        while done < len(kept):
            some = of_one_pass(kept[done:], ROWS_OF_PASS)
            stream.write(_pass(llm, some, taps).view(torch.int16).numpy().tobytes())
            done += len(some)
            report(len(some))
    return open_states(file, kept)


def open_states(file: Path, dialogues: Sequence[Dialogue]) -> States:
    """The states of a file that is complete.

    Args:
        dialogues: that they are of; further ones are left out.

    Raises:
        UserError: there is no such file, or it is cut off.
    """
    told = read_json(_told(file))
    within = told.get(WITHIN, {"file": file.name, "taps": told["taps"]})
    file, held = file.with_name(within["file"]), within["taps"]
    kept = dialogues[: told["count"]]
    bounds = [0, *accumulate(len(dialogue.ids) for dialogue in kept)]
    try:
        # Written to by nobody, but PyTorch takes no memory that is read-only.
        mapped = np.memmap(file, np.int16, "c", shape=(bounds[-1], len(held), told["hidden"]))
        columns = [held.index(tap) for tap in told["taps"]]
    except (OSError, ValueError) as error:
        raise UserError(f"the hidden states in {file} cannot be read") from error
    own = [[False] * len(each.prompt) + [True] * len(each.answer) for each in kept]
    return States(
        torch.tensor([token for each in kept for token in each.ids]),
        torch.tensor([flag for flags in own for flag in flags]),
        bounds,
        torch.from_numpy(mapped).view(torch.bfloat16),
        columns,
    )


def _told(file: Path) -> Path:
    """Where it stands what a file was made of."""
    return file.with_name(f"{file.name}.json")


class _Origins:
    """What states depend on. What the dialogues say is read once, however many of the first are asked about."""

    def __init__(self, llm: LLM, dialogues: Sequence[Dialogue]) -> None:
        self._llm, self._digests = llm, digests(dialogues)

    def of_first(self, count: int | None, taps: Sequence[Tap]) -> dict[str, Any]:
        """Of the states of so many dialogues, or of all that there are."""
        most = len(self._digests) - 1
        count = most if count is None else max(0, min(count, most))
        return {
            "model": self._llm.folder.name,
            "dtype": str(self._llm.model.dtype).removeprefix("torch."),
            "backend": self._llm.model.backend.name,
            "taps": [list(tap) for tap in taps],
            "hidden": self._llm.model.config.hidden_size,
            "count": count,
            "dialogues": self._digests[count],
        }


def digests(dialogues: Iterable[Dialogue]) -> list[str]:
    """SHA-256 of what is said by none of them, by the first, by the first two, and so on."""
    told = hashlib.sha256()
    found = [told.hexdigest()]
    for dialogue in dialogues:
        told.update(np.array([*dialogue.prompt, -1, *dialogue.answer, -2], dtype=np.int64).tobytes())
        found.append(told.hexdigest())
    return found


def _check(origins: _Origins, taps: Sequence[Tap], file: Path) -> None:
    """Remove a file of which nothing says what it was made of. What was read of the first dialogues is gone on with.

    Raises:
        UserError: one that is there was made of something else.
    """
    if not (file.exists() and _told(file).exists()):
        file.unlink(missing_ok=True)
        return
    before = read_json(_told(file))
    count = before.get("count")
    if changed := differences(before, origins.of_first(count if isinstance(count, int) else None, taps)):
        raise UserError(f"the hidden states in {file} are of another {changed}: remove it to read them again")


def _serving(origins: _Origins, taps: Sequence[Tap], rows: int, file: Path) -> dict[str, Any] | None:
    """Another file in the folder that has these taps, among others, of all of the first rows: `file` and its `taps`."""
    for told in sorted(file.parent.glob("*.json")):
        other = told.with_suffix("")
        if other == file or not other.exists():
            continue
        before = read_json(told)
        held, count = before.get("taps"), before.get("count")
        if not isinstance(held, list) or not isinstance(count, int) or any(list(tap) not in held for tap in taps):
            continue
        origin = origins.of_first(count, taps)
        whole = other.stat().st_size >= 2 * rows * len(held) * origin["hidden"]
        if whole and not differences(before, {**origin, "taps": held}):
            return {"file": other.name, "taps": held}
    return None


def of_one_pass(dialogues: Sequence[Dialogue], rows: int) -> Sequence[Dialogue]:
    """As many of the first as share a pass of so many rows, at least one."""
    ends = accumulate(len(dialogue.ids) for dialogue in dialogues[:rows])
    return dialogues[: max(1, sum(1 for end in ends if end <= rows))]


@contextmanager
def reading(llm: LLM, dialogues: Sequence[Dialogue]) -> Iterator[Rows]:
    """The rows of a pass over some dialogues; what it leaves in the cache goes with the context."""
    sequences = [llm.engine.cache.sequence() for _ in dialogues]
    chains = [(sequence, dialogue.ids, 0) for sequence, dialogue in zip(sequences, dialogues, strict=True)]
    try:
        yield Rows.of_several(chains, llm.model.device)
    finally:
        for sequence in sequences:
            sequence.release()


@torch.inference_mode()
def _pass(llm: LLM, dialogues: Sequence[Dialogue], taps: Sequence[Tap]) -> Tensor:
    """bfloat16 [rows, taps, hidden] of some dialogues."""
    states = Taps(taps)
    with reading(llm, dialogues) as rows:
        llm.model.forward(rows, [], states)
    return torch.stack([states[tap] for tap in taps], 1).bfloat16().cpu().contiguous()
