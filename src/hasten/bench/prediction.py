"""The speed-up that a method's own figures predict.

A step of n rows costs a plain step and what the n - 1 further rows add to the forward pass; the drafting comes on top.
So a method that gives t tokens a step is expected to be t * plain / (plain + further + draft) times as fast.
"""

from __future__ import annotations

from hasten.engine.cost import VerifyCost


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
        curve: what rows cost.
        plain_step: seconds of a step of plain decoding.
        plain_forward: those of its forward pass.
        tokens_per_step: that the method gives.
        rows_per_step: that it verifies: its draft's nodes and the root.
        draft_seconds: that it spends on drafting per step.
    """
    further = (curve.ratio(rows_per_step) - 1) * plain_forward
    return tokens_per_step * plain_step / (plain_step + further + draft_seconds)
