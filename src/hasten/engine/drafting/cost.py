"""The verify-cost curve: what a step of n rows costs on this machine with this model, measured and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hasten.cache import Cache
from hasten.documents import dumps
from hasten.files import cache_folder
from hasten.model import Rows, Span, native
from hasten.model.checkpoint import weight_bytes

if TYPE_CHECKING:
    from hasten.model import Model

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 960)
MOST_ROWS = 4096
"""Of a record: a table is made of all numbers up to the last."""
BATCH = 8
UNDISTURBED, DISTURBED_SECONDS = 0.85, 3600.0
"""The share of a measurement for which this thread computes, at least, where nothing else has a core; and how long a
curve is kept that was measured beside something else."""
MEASURE_SECONDS = 3.0
"""About how long a measurement may take, where the model is fast enough for a few repetitions at all."""


@dataclass(frozen=True)
class VerifyCost:
    """Seconds of a step by rows and context length; a further sequence in the batch adds `per_sequence`.

    `seconds[c][r]` is for `contexts[c]` cached tokens and `rows[r]` rows of one sequence. Between the points the curve
    is linear; beyond the last rows it goes on as it went before.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    per_sequence: float

    def of(self, rows: float, context: float, batch: int = 1) -> float:
        """Seconds of a step.

        Args:
            rows: of all sequences together; a mean need not be whole.
            context: cached tokens, the mean over the batch.
            batch: sequences.
        """
        short, long = self._curve(0, rows), self._curve(len(self.contexts) - 1, rows)
        low, high = self.contexts[0], self.contexts[-1]
        share = min(max((context - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        return short + share * (long - short) + (batch - 1) * self.per_sequence

    def ratio(self, rows: float, context: float = CONTEXTS[0]) -> float:
        """v(n): the cost of a step of n rows over that of one."""
        return self.of(rows, context) / self.of(1, context)

    def _curve(self, context: int, rows: float) -> float:
        table = self._tables[context]
        low = min(int(rows), len(table) - 2)
        return table[low] + (rows - low) * (table[low + 1] - table[low])

    @cached_property
    def _tables(self) -> list[list[float]]:
        """Per context, seconds for 0, 1, 2 ... rows; never falling, whatever the noise of a measurement."""
        counts = range(self.rows[-1] + 1)
        return [np.interp(counts, self.rows, np.maximum.accumulate(curve)).tolist() for curve in self.seconds]


def step_seconds(
    model: Model,
    shapes: Sequence[tuple[int, int]],
    context: int,
    repeats: int | None = None,
    of: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[tuple[int, int], float]:
    """Seconds of a forward pass of each shape: see `step_times`.

    Args:
        of: which of a shape's passes counts.
    """
    return {shape: of(times) for shape, times in step_times(model, shapes, context, repeats).items()}


@torch.inference_mode()
def step_times(
    model: Model,
    shapes: Sequence[tuple[int, int]],
    context: int,
    repeats: int | None = None,
    beside: Callable[[], None] = lambda: None,
) -> dict[tuple[int, int], list[float]]:
    """Seconds of every forward pass of each shape, all behind a context; the shapes take turns.

    Args:
        shapes: (sequences, rows of each).
        context: cached tokens of every sequence.
        repeats: passes per shape; None takes as many as fit into `MEASURE_SECONDS`, 3 to 25.
        beside: is called at the start of every turn that counts.
    """
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    generator = torch.Generator().manual_seed(0)
    longest = context + max(rows for _, rows in shapes)
    tokens = torch.randint(model.config.vocab_size, (longest,), generator=generator).to(model.device)
    sequences = []
    for _ in range(max(count for count, _ in shapes)):
        sequence = cache.sequence()
        sequence.reserve(longest)
        model.forward(Rows.of(sequence, tokens[:context].tolist(), 0, model.device), [context - 1])
        sequence.commit(context)
        sequences.append(sequence)
    times: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    turn, turns = 0, 2 if repeats is None else repeats + 1
    while turn < turns:
        if turn > 0:
            beside()
        for count, rows in shapes:
            spans = [Span(sequence, i * rows, (i + 1) * rows) for i, sequence in enumerate(sequences[:count])]
            positions = torch.arange(context, context + rows, device=model.device).repeat(count)
            batch = Rows(tokens[context : context + rows].repeat(count), positions, spans)
            started = time.perf_counter()
            # Reading a value waits for the device.
            float(model.forward(batch)[0, 0])
            # The first turn warms up.
            if turn > 0:
                times[count, rows].append(time.perf_counter() - started)
        turn += 1
        if turn == 2 and repeats is None:
            a_turn = sum(values[-1] for values in times.values())
            turns = 1 + int(min(max(MEASURE_SECONDS / len(CONTEXTS) / max(a_turn, 1e-9), 3), 25))
    for sequence in sequences:
        sequence.release()
    return times


def measure(model: Model) -> VerifyCost:
    """The curve of a model, now."""
    longest = model.config.max_positions - ROWS[-1]
    contexts = tuple(sorted({max(1, min(context, longest)) for context in CONTEXTS}))
    curves = []
    per_sequence = 0.0
    for context in contexts:
        spread = (BATCH, ROWS[-1] // BATCH)
        # The fastest pass: what else the machine does only ever adds, and the record stays for good.
        times = step_seconds(model, [*((1, rows) for rows in ROWS), spread], context, of=min)
        curves.append(tuple(times[1, rows] for rows in ROWS))
        per_sequence = max(per_sequence, (times[spread] - times[1, ROWS[-1]]) / (BATCH - 1))
    return VerifyCost(ROWS, contexts, tuple(curves), per_sequence)


def verify_cost(model: Model, folder: str | None) -> VerifyCost:
    """The curve of a model on this machine: from disk if it was measured before, else measured now.

    Args:
        folder: the checkpoint's; None (an oracle) is measured without a record.
    """
    if folder is None:
        return measure(model)
    subject = {
        "model": str(Path(folder).resolve()),
        "weights": weight_bytes(Path(folder)),
        # How they are stored, rounded or transformed.
        "read": model.weight_bytes(),
        "dtype": str(getattr(model, "dtype", model.cache_dtype)),
        "backend": getattr(getattr(model, "backend", None), "name", ""),
        "kernels": native.kernels(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder("verify-cost") / f"{name}.json"
    known = _read(file)
    if known is None:
        began, computed = time.perf_counter(), time.thread_time()
        known = measure(model)
        share = (time.thread_time() - computed) / (time.perf_counter() - began)
        _write(file, {"subject": subject, "computing": share, **asdict(known)})
    return known


def _processor() -> str:
    return f"{os.cpu_count()} x {torch.backends.cpu.get_cpu_capability()}"


def _read(file: Path) -> VerifyCost | None:
    """A recorded curve; None where there is none that can be read, or one of a busy machine that has had its time."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["computing"] < UNDISTURBED and time.time() - file.stat().st_mtime > DISTURBED_SECONDS:
            return None
        seconds = tuple(tuple(float(value) for value in curve) for curve in record["seconds"])
        curve = VerifyCost(tuple(record["rows"]), tuple(record["contexts"]), seconds, float(record["per_sequence"]))
        return curve if _fits(curve) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _fits(curve: VerifyCost) -> bool:
    """Whether a record is a curve: whole numbers that grow, and a time for each pair of them."""
    growing = all(
        all(type(each) is int for each in axis) and list(axis) == sorted(set(axis))
        for axis in (curve.rows, curve.contexts)
    )
    return (
        growing
        and len(curve.rows) > 1
        and curve.rows[0] == 1
        and curve.rows[-1] <= MOST_ROWS
        and bool(curve.contexts)
        and curve.contexts[0] > 0
        and [len(each) for each in curve.seconds] == [len(curve.rows)] * len(curve.contexts)
        and all(0 < each < inf for each in chain(*curve.seconds))
        and isfinite(curve.per_sequence)
    )


def _write(file: Path, record: dict[str, Any]) -> None:
    """Keep a curve; a folder that cannot be written costs a measurement next time, no more."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may measure one model: each writes under a name of its own.
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            fresh = Path(scratch) / file.name
            fresh.write_text(dumps(record, indent=1), encoding="utf-8")
            os.replace(fresh, file)
    except OSError:
        return
