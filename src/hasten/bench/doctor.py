"""What this machine can do: read bandwidth, the step's cost against it, and what a further row costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from hasten.bench.divergence import examine, rounded
from hasten.bench.processor import processor_name
from hasten.engine.drafting.cost import step_times
from hasten.llm import LLM
from hasten.model import Rows, native

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CONTEXT = 256
"""Cached tokens behind which steps are timed."""
BANDWIDTH_BYTES = 512 * 2**20


class Reader:
    """A buffer far larger than any cache, read by all cores."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)

    def bandwidth(self) -> float:
        """Bytes per second (in 1e9), read once."""
        started = time.perf_counter()
        float(self.buffer.sum())
        return self.buffer.nbytes / (time.perf_counter() - started) / 1e9


def read_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes per second (in 1e9) that all cores read; the best of several."""
    reader = Reader(device)
    return max(reader.bandwidth() for _ in range(repeats))


@torch.inference_mode()
def row_invariant(llm: LLM, context: int = 64, count: int = 8) -> bool:
    """Whether a row computed beside others has the very bits it has alone."""
    model = llm.model
    tokens = [(index * 7 + 3) % model.config.vocab_size for index in range(context + count)]
    together, alone = llm.engine.cache.sequence(), llm.engine.cache.sequence()
    try:
        for sequence in (together, alone):
            model.forward(Rows.of(sequence, tokens[:context], 0, model.device), [0])
            sequence.commit(context)
        batch = model.forward(Rows.of(together, tokens[context:], context, model.device))
        for index in range(count):
            row = model.forward(Rows.of(alone, tokens[context + index :][:1], context + index, model.device))
            alone.commit(1)
            if not torch.equal(row[0], batch[index]):
                return False
        return True
    finally:
        together.release()
        alone.release()


def step_costs(llm: LLM) -> dict[str, Any]:
    """What a step costs in one precision, and what the memory gives in the same moments.

    Bandwidth is read in turns with the steps: what else the machine does falls on both. Medians, of ratios where two
    times are compared.

    Keys: `bandwidth_gbs`, in 1e9 bytes per second; `weight_bytes`; `step_ms` for one row; `roofline_ms`, the time in
    which the weights can be read; `bandwidth_share`, that time over the step's (a model that fits into the processor's
    caches can have more than 1); `verify_cost`, v(n): the cost of a step of n rows over that of one; `token_cost`: of
    each further row up to 8, in steps. A draft pays where more of its tokens are accepted than that.
    """
    context = min(CONTEXT, llm.model.config.max_positions - max(ROWS))
    reader, bandwidths = Reader(llm.model.device), []
    times = step_times(llm.model, [(1, n) for n in ROWS], context, beside=lambda: bandwidths.append(reader.bandwidth()))
    one, weight_bytes = times[1, 1], llm.model.weight_bytes()
    costs = {rows: statistics.median(map(truediv, found, one)) for (_, rows), found in times.items()}
    roofs = [weight_bytes / bandwidth / 1e9 for bandwidth in bandwidths]
    return {
        "bandwidth_gbs": round(statistics.median(bandwidths), 2),
        "weight_bytes": weight_bytes,
        "step_ms": round(statistics.median(one) * 1e3, 4),
        "roofline_ms": round(statistics.median(roofs) * 1e3, 4),
        "bandwidth_share": round(statistics.median(map(truediv, roofs, one)), 4),
        "verify_cost": {str(rows): round(cost, 4) for rows, cost in costs.items()},
        "token_cost": round((costs[8] - 1) / 7, 4),
    }


def doctor(
    llm: LLM,
    precisions: Mapping[str, Callable[[], LLM]] | None = None,
    invariant: Callable[[], LLM] | None = None,
    expanded: Callable[[], LLM] | None = None,
    prompts: Path | None = None,
    report: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """The JSON document of `hasten doctor`: the machine, `row_invariant`, and `step_costs`.

    Args:
        llm: what is examined.
        precisions: the same model in other precisions, to compare steps: the document's `precisions`.
        invariant: the same model with `numerics="invariant"`, where that costs anything: the document's
            `invariance_price`, the cost of a step of one row over what it costs now. Native rows have it for nothing.
        expanded: the same model in float32, to compare predictions with, where its weights are `rounded` or prompts are
            given: the document's `divergence` (`hasten.bench.divergence.examine`), else null.
        prompts: a file of what to compare them on; by default a few short ones.
        report: is told of each stage.
    """
    report("timing steps of 1 to 32 rows, and reads of memory")
    document = machine(llm) | {
        **step_costs(llm),
        "row_invariant": row_invariant(llm),
    }
    if llm.model.backend.name == "native":
        document["invariance_price"] = 1.0
    elif invariant is not None:
        report("timing steps with invariant numerics")
        document["invariance_price"] = step_costs(invariant())["step_ms"] / document["step_ms"]
    document["divergence"] = None
    if expanded is not None and (prompts is not None or rounded(llm.model)):
        document["divergence"] = examine(llm, expanded, prompts, report)
    if precisions is not None:
        document["precisions"] = {}
        for name, load in precisions.items():
            report(f"timing steps in {name}")
            document["precisions"][name] = step_costs(load())
    return document


def machine(llm: LLM) -> dict[str, Any]:
    """What is measured on: device, software and model."""
    return {
        "device": str(llm.model.device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": llm.model.backend.name,
        "kernels": native.kernels() if llm.model.backend.name == "native" else None,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "model": str(llm.folder),
    }


def _processor() -> str:
    """The processor's (or the GPU's) name and what of it counts here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()} {torch.backends.cpu.get_cpu_capability()}"
