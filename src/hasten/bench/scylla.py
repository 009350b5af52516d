"""Scylla: how tokens per step grow with a drafter's training and size, and how speed moves with the batch.

Yan et al. 2025, "Scaling Laws for Speculative Decoding", 2505.07858. The laws are empirical fits (`laws.py` says how,
and what is not the paper's); nothing is claimed beyond the range that was measured. A drafter is used as a chain of a
fixed length, verified exactly, so a family's members differ in speed only.

What follows from the fits is a plan: tokens per step at each draft length from the measured acceptance of each
position, and the cost of both models' steps from their measured curves, give the length that is fastest at each batch
size, zero included. The plan is set against what was measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.bench.lane import engine_for
from hasten.bench.laws import bootstrap_error, law
from hasten.engine import Limits, Request, SamplingParams
from hasten.engine.cost import VerifyCost, measure
from hasten.llm import LLM
from hasten.model import Decoder, load_model

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

    def at_length(self, length: int) -> float:
        """Tokens per step of a chain of another length, from the positions' acceptance; the last goes on."""
        total, reached = 1.0, 1.0
        for position in range(length):
            reached *= self.positions[min(position, len(self.positions) - 1)]
            total += reached
        return total


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


def predicted(
    target: VerifyCost, drafter: VerifyCost, accepted: Acceptance, batch: int, length: int, context: int
) -> float:
    """Tokens per second of a batch with drafts of a length; 0 is plain decoding."""
    seconds = target.of(batch * (length + 1), context, batch)
    if length:
        # The first draft step also reads what was accepted before; the others one token each.
        fresh = math.ceil(accepted.at_length(length))
        seconds += drafter.of(batch * fresh, context, batch) + (length - 1) * drafter.of(batch, context, batch)
    return batch * accepted.at_length(length) / seconds


def plan(
    target: VerifyCost, drafter: VerifyCost, accepted: Acceptance, batches: Sequence[int], longest: int, context: int
) -> dict[int, int]:
    """The fastest draft length at each batch size, 0 where plain decoding is."""
    return {
        batch: max(range(longest + 1), key=lambda n: predicted(target, drafter, accepted, batch, n, context))
        for batch in batches
    }


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
    """Measure a family, fit the laws, plan, and compare the plan with what was measured.

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
    batch = _by_batch(llm, best, measured[best], prompts, length, batches, max_tokens)
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
    accepted: Acceptance,
    prompts: Sequence[str],
    length: int,
    batches: Sequence[int],
    max_tokens: int,
) -> dict[str, Any]:
    """Speed at each batch size, plain and with drafts of each length up to `length`, beside what the plan says."""
    target, small = measure(llm.model), measure(_small(drafter, llm))
    context = max_tokens // 2 + sum(len(llm.encode(prompt)) for prompt in prompts) // len(prompts)
    # The same prompts at every batch size, a few from every task.
    sample = prompts[:: max(1, len(prompts) // SAMPLE)]
    lengths = range(1, length + 1)
    planned = plan(target, small, accepted, batches, length, context)
    points = []
    for batch in batches:
        plain, *rates = throughput(llm, ["plain", *(method(drafter, n) for n in lengths)], sample, batch, max_tokens)
        fastest = max([(plain, 0), *zip(rates, lengths, strict=True)])
        expected = predicted(target, small, accepted, batch, length, context)
        points.append(
            {
                "x": batch,
                "plain_tokens_per_second": plain,
                "tokens_per_second": rates[-1],
                "speedup": rates[-1] / plain,
                "predicted_speedup": expected / predicted(target, small, accepted, batch, 0, context),
                "planned_length": planned[batch],
                "fastest_length": fastest[1],
            }
        )
    document: dict[str, Any] = {"points": points}
    for name, key in (("law", "tokens_per_second"), ("speedup_law", "speedup")):
        document[name] = law([point["x"] for point in points], [point[key] for point in points]).document()
    return document


def _small(drafter: Path, llm: LLM) -> Decoder:
    return load_model(drafter, dtype="auto", device=str(llm.model.device))


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
    lines += ["", "| batch | speed-up | predicted | fastest length | planned |", "|---|---|---|---|---|"]
    for point in document["batch"]["points"]:
        lines.append(
            f"| {point['x']} | {point['speedup']:.2f} | {point['predicted_speedup']:.2f} "
            f"| {point['fastest_length']} | {point['planned_length']} |"
        )
    return "\n".join([*lines, ""])
