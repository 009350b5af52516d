"""The speed-up that a method's own figures predict, and the verify-cost curve that it takes.

A step of n rows costs a plain step and what the n - 1 further rows add to the forward pass; the drafting comes on top.
So a method that gives t tokens a step is expected to be t * plain / (plain + further + draft) times as fast.
"""

from __future__ import annotations

from collections.abc import Mapping

from hasten.bench.doctor import step_costs
from hasten.llm import LLM

VerifyCost = Mapping[int, float]
"""v(n): the cost of a forward pass of n rows over that of one."""

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def measure(llm: LLM) -> VerifyCost:
    """The curve of this model on this machine, now."""
    costs = step_costs(llm, ROWS)
    return {rows: seconds / costs[1] for rows, seconds in costs.items()}


def cost_of(curve: VerifyCost, rows: float) -> float:
    """v of any number of rows: linear between the measured points, and on beyond the last."""
    points = sorted(curve.items())
    if len(points) == 1:
        return points[0][1]
    right = max(next((place for place, (count, _) in enumerate(points) if count >= rows), len(points) - 1), 1)
    (low, before), (high, after) = points[right - 1], points[right]
    return before + (rows - low) / (high - low) * (after - before)


def predicted_speedup(
    curve: VerifyCost,
    plain_step: float,
    plain_forward: float,
    tokens_per_step: float,
    rows_per_step: float,
    draft_seconds: float,
) -> float:
    """Speed-up of decoding, the prompt apart.

    Args:
        curve: v(n).
        plain_step: seconds of a step of plain decoding.
        plain_forward: those of its forward pass.
        tokens_per_step: that the method gives.
        rows_per_step: that it verifies: its draft's nodes and the root.
        draft_seconds: that it spends on drafting per step.
    """
    further = (cost_of(curve, rows_per_step) - 1) * plain_forward
    return tokens_per_step * plain_step / (plain_step + further + draft_seconds)
