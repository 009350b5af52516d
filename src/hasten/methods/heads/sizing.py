"""How much of a head's tree is worth verifying on this machine: a planner's answer, for one drafter by itself."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.engine import Draft, Observation, Request, Target
from hasten.engine.drafting.cost import verify_cost
from hasten.engine.drafting.planner import Calibration, Planner


class Sizing:
    """Cuts the drafts of a batch to the nodes that pay by the verify-cost curve v(n).

    What a head promises is held against what came, in each request by itself.

    Args:
        target: whose steps verify.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._planner: Planner | None = None
        self._calibrations: dict[int, Calibration] = {}
        self._whole: dict[int, Draft] = {}

    def prepare(self) -> Planner:
        """The planner; its curve is measured unless it is known."""
        if self._planner is None:
            self._planner = Planner(verify_cost(self._target.model, self._target.folder))
        return self._planner

    def cut(self, requests: Sequence[Request], drafts: Sequence[Draft]) -> list[Draft]:
        """What is left of each draft; it must say estimates of all its nodes."""
        if not requests:
            return []
        promised = [self._calibration(each).probabilities(draft) for each, draft in zip(requests, drafts, strict=True)]
        context = sum(len(request.tokens) for request in requests) / len(requests)
        plan = self.prepare().plan(promised, context)
        self._whole |= {request.id: draft for request, draft in zip(requests, drafts, strict=True)}
        return [
            draft if len(nodes) == len(draft) else draft.subset(nodes)
            for draft, nodes in zip(drafts, plan.nodes, strict=True)
        ]

    def learn(self, request: Request, seen: Observation) -> None:
        """A step was verified, with the draft that was cut or another one."""
        whole = self._whole.pop(request.id, None)
        if whole is not None:
            self._calibration(request).observe(whole, whole.judged(seen.tokens))

    def end(self, request: Request) -> None:
        self._whole.pop(request.id, None)
        self._calibrations.pop(request.id, None)

    def _calibration(self, request: Request) -> Calibration:
        return self._calibrations.setdefault(request.id, Calibration())
