"""Scylla: how tokens per step grow with a drafter's training and size, and how speed moves with the batch.

Yan et al. 2025, "Scaling Laws for Speculative Decoding", 2505.07858. The laws are empirical fits (`laws.py` says how,
and what is not the paper's); nothing is claimed beyond the range that was measured. A drafter is used as a chain of a
fixed length, verified exactly, so a family's members differ in speed only.

The fits plan nothing. Which draft length is fastest depends on what lies between the passes of a small drafter, on the
part that its attention gets while a draft grows and on the reading of prompts, which no curve of forward passes holds:
it is measured at each batch size instead, and at run time by `--method auto`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.bench.lane import engine_for
from hasten.bench.laws import bootstrap_error, law
from hasten.engine import Limits, Request, SamplingParams
from hasten.llm import LLM
from hasten.model import load_model

ROUNDS = 3
"""Times that a throughput is measured; the median counts."""
SAMPLE = 40
"""Prompts of a throughput."""


@dataclass(frozen=True)
class Acceptance:
    """What a drafter achieved on a set of prompts.

    Attributes:
        tokens_per_step: over all steps behind the first token of each prompt.
        error: its standard error, by resampling prompts.
        positions: probability that draft token k is accepted, given that the k-1 before it were.
    """

    tokens_per_step: float
    error: float
    positions: list[float]


def method(drafter: Path, length: int) -> str:
    """A chain of a fixed length, whatever the drafter's confidence."""
    return f"draft-model:model={drafter},length={length},confidence=0"


def acceptance(llm: LLM, drafter: Path, prompts: Sequence[str], length: int, max_tokens: int) -> Acceptance:
    """Decode the prompts greedily with a drafter, and count.

    Raises:
        UserError: a drafter that does not fit the model, a prompt that is too long.
    """
    engine = engine_for(llm)
    params = SamplingParams(max_tokens=max_tokens)
    requests = [engine.add(llm.encode(prompt), params, method(drafter, length))[0] for prompt in prompts]
    for _ in engine.run():
        pass
    counts = [(r.statistics.tokens - 1, r.statistics.steps - 1) for r in requests if r.statistics.steps > 1]
    # A step near the end of a text is cut short: only whole drafts say something about positions.
    accepted = [count for request in requests for count in _whole_drafts(request, length)]
    reached = [sum(count >= position for count in accepted) for position in range(length + 1)]
    positions = [reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(length)]
    return Acceptance(_rate(counts), bootstrap_error(counts, _rate), positions)


def _whole_drafts(request: Request, length: int) -> list[int]:
    """Accepted tokens of the steps that could have accepted all."""
    statistics = request.statistics
    left = statistics.tokens - 1
    counts = []
    for accepted in statistics.accepted_per_step[1:]:
        if left > length:
            counts.append(accepted)
        left -= accepted + 1
    return counts


def _rate(counts: Sequence[tuple[int, int]]) -> float:
    return sum(tokens for tokens, _ in counts) / max(1, sum(steps for _, steps in counts))


def size_of(drafter: Path) -> int:
    """Parameters of the layers: tied embeddings would dominate so small a model, and say nothing."""
    model = load_model(drafter, dtype="float32", device="cpu")
    return (model.weight_bytes() - model.head.nbytes()) // 4


def throughput(llm: LLM, specs: Sequence[str], prompts: Sequence[str], batch: int, max_tokens: int) -> list[float]:
    """Tokens per second of each method, reading of prompts included; the methods take turns.

    Args:
        batch: so many prompts are decoded at a time; one that ends makes room for the next.
    """
    params = SamplingParams(max_tokens=max_tokens)
    ids = [llm.encode(prompt) for prompt in prompts]
    engines = [engine_for(llm, Limits(sequences=batch)) for _ in specs]
    rates: list[list[float]] = [[] for _ in specs]
    for turn in range(ROUNDS + 1):
        for engine, spec, own in zip(engines, specs, rates, strict=True):
            started = time.perf_counter()
            requests = [engine.add(each, params, spec)[0] for each in ids]
            for _ in engine.run():
                pass
            if turn:
                own.append(sum(len(request.output) for request in requests) / (time.perf_counter() - started))
    return [sorted(own)[len(own) // 2] for own in rates]


@dataclass(frozen=True)
class Family:
    """Drafters along the two axes: (value, folder), the value being training tokens or layers."""

    by_tokens: Sequence[tuple[int, Path]]
    by_layers: Sequence[tuple[int, Path]]


def scylla(
    llm: LLM,
    family: Family,
    prompts: Sequence[str],
    length: int,
    batches: Sequence[int],
    max_tokens: int,
    report: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Measure a family and fit the laws.

    Raises:
        UserError: too few points on an axis, a drafter that does not fit.
    """
    measured: dict[Path, Acceptance] = {}
    for folder in (folder for _, folder in (*family.by_tokens, *family.by_layers)):
        if folder not in measured:
            report(f"measuring {folder.name}")
            measured[folder] = acceptance(llm, folder, prompts, length, max_tokens)

    def axis(points: Sequence[tuple[float, Path]]) -> dict[str, Any]:
        found = [(x, measured[folder]) for x, folder in points]
        fit = law([x for x, _ in found], [each.tokens_per_step for _, each in found])
        return {
            "points": [
                {"x": x, "tokens_per_step": each.tokens_per_step, "error": each.error, "positions": each.positions}
                for x, each in found
            ],
            "law": fit.document(),
        }

    best = max(measured, key=lambda folder: measured[folder].tokens_per_step)
    report(f"batches with {best.name}")
    batch = _by_batch(llm, best, prompts, length, batches, max_tokens)
    return {
        "length": length,
        "prompts": len(prompts),
        "data": axis(family.by_tokens),
        "capacity": axis([(size_of(folder), folder) for _, folder in family.by_layers]),
        "batch": batch,
        "best_drafter": str(best),
    }


def _by_batch(
    llm: LLM,
    drafter: Path,
    prompts: Sequence[str],
    length: int,
    batches: Sequence[int],
    max_tokens: int,
) -> dict[str, Any]:
    """Speed at each batch size, plain and with drafts of each length up to `length`."""
    # The same prompts at every batch size, a few from every task.
    sample = prompts[:: max(1, len(prompts) // SAMPLE)]
    lengths = range(1, length + 1)
    points = []
    for batch in batches:
        plain, *rates = throughput(llm, ["plain", *(method(drafter, n) for n in lengths)], sample, batch, max_tokens)
        fastest = max([(plain, 0), *zip(rates, lengths, strict=True)])
        points.append(
            {
                "x": batch,
                "plain_tokens_per_second": plain,
                "tokens_per_second": rates[-1],
                "speedup": rates[-1] / plain,
                "fastest_length": fastest[1],
            }
        )
    document: dict[str, Any] = {"points": points}
    for name, key in (("law", "tokens_per_second"), ("speedup_law", "speedup")):
        document[name] = law([point["x"] for point in points], [point[key] for point in points]).document()
    return document


def render(document: dict[str, Any], command: str) -> str:
    """The report as Markdown, to stand beside `laws.svg`."""
    lines = [
        "# How drafters scale",
        "",
        f"    {command}",
        "",
        f"Chains of {document['length']} tokens, {document['prompts']} held-out prompts, greedy, float32.",
        "",
        "![The three axes, with the fitted lines](laws.svg)",
        "",
        "| axis | figure | slope per decade | 95 % interval | R2 | error at the held-out point | best form by AICc |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = (
        ("training tokens", "tokens per step", document["data"]["law"]),
        ("parameters", "tokens per step", document["capacity"]["law"]),
        ("batch", "tokens per second", document["batch"]["law"]),
        ("batch", "speed-up over plain", document["batch"]["speedup_law"]),
    )
    for axis, figure, law_ in rows:
        low, high = law_["interval"]
        slope = f"{law_['slope_per_decade']:.3g}" + ("" if law_["detected"] else " (no effect detected)")
        lines.append(
            f"| {axis} | {figure} | {slope} | {low:.3g} to {high:.3g} | {law_['r2']:.3f} "
            f"| {100 * law_['held_out_error']:.1f} % | {law_['best_form']} |"
        )
    lines += ["", "| batch | speed-up | fastest length |", "|---|---|---|"]
    for point in document["batch"]["points"]:
        lines.append(f"| {point['x']} | {point['speedup']:.2f} | {point['fastest_length']} |")
    return "\n".join([*lines, ""])
