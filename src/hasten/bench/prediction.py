"""The speed-up that a method's own figures predict.

A step of n rows costs a plain step and what the n - 1 further rows add to the forward pass; the drafting comes on top.
So a method that gives t tokens a step is expected to be t * plain / (plain + further + draft) times as fast. Where
plain decoding itself computes several rows a step, as of a block of a canvas, v(n) is taken relative to v of these.
"""

from __future__ import annotations

from hasten.engine.drafting.cost import VerifyCost


def predicted_speedup(
    curve: VerifyCost,
    plain_step: float,
    plain_forward: float,
    tokens_per_step: float,
    rows_per_step: float,
    draft_seconds: float,
    plain_rows: float = 1.0,
) -> float:
    """Speed-up of decoding, the prompt apart.

    Args:
        curve: what rows cost.
        plain_step: seconds of a step of plain decoding.
        plain_forward: those of its forward pass.
        tokens_per_step: that the method gives, for each one of plain decoding.
        rows_per_step: that it verifies: its draft's nodes and the root.
        draft_seconds: that it spends on drafting per step.
        plain_rows: rows of a plain step.
    """
    further = (curve.ratio(rows_per_step) / curve.ratio(plain_rows) - 1) * plain_forward
    return tokens_per_step * plain_step / (plain_step + further + draft_seconds)
