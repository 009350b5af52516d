"""Drafters whose guesses the target makes itself: in each verification, rows behind the nodes say what comes next.

The rows are no tokens, but something trained (`SoftRows`) that asks. Those behind the node where a verification ends
have then seen all that was accepted, and their final states, through the target's own head, are the next draft. So each
step verifies and drafts in one pass; the first one drafts only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hasten.engine import ROOT, Draft, Drafter, Observation, Probe, Request, SoftRows, Target
from hasten.engine.drafting.cost import VerifyCost, verify_cost
from hasten.engine.drafting.planner import Calibration
from hasten.errors import UserError
from hasten.methods.heads.allotment import allot, gains
from hasten.methods.heads.guesses import Guesses
from hasten.methods.heads.head import FINAL, logits_of, require_decoder
from hasten.methods.heads.tree import best_of_levels
from hasten.model.taps import Site

STEPS = 4.0
"""Plain steps that are worth as much as what a request has done so far, for its pace."""
UNKNOWN = 0.5
"""How often a first rank is right where nobody measured it, a level's over that of the one before; so are ranks."""
MOST_ROWS = 128


@dataclass(frozen=True)
class ProbingParameters:
    """Parameters of all of them.

    Attributes:
        head: the folder of what was trained; by default that beside the target.
        nodes: guesses of a step at most.
        rows: of a step at most, the root's and those that draft included.
        sized: whether only those are computed that pay on this machine.
        ranks: tokens of each level that may be guessed.

    Raises:
        UserError: out of range.
    """

    head: str = ""
    nodes: int = 15
    rows: int = 40
    sized: bool = True
    ranks: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 64 or not 1 <= self.ranks <= 64:
            raise UserError("nodes and ranks must be between 1 and 64")
        if not 2 <= self.rows <= MOST_ROWS:
            raise UserError(f"rows must be between 2 and {MOST_ROWS}")


@dataclass
class Course:
    """How a request goes: final states [prompts, hidden] of what drafts next, and what came of its steps.

    `spent` is what they cost, a plain step being 1.
    """

    states: Tensor | None = None
    whole: Draft = field(default_factory=Draft)
    calibration: Calibration = field(default_factory=Calibration)
    gained: float = STEPS
    spent: float = STEPS


class ProbeDrafter(Drafter):
    """Keeps, per request, the final states of the rows behind the last node that was accepted.

    Args:
        target: that verifies and drafts.
        slug: of the method.
        forms: the rows that stand for one prompt, for two prompts, and so on; all prompts have as many.
        accuracy: per prompt, how often each rank is right; empty where nobody measured it.
    """

    alone: ClassVar[bool] = True
    taps: ClassVar[tuple[tuple[Site, int], ...]] = (FINAL,)  # type: ignore[misc]

    def __init__(
        self,
        target: Target,
        slug: str,
        parameters: ProbingParameters,
        forms: Sequence[SoftRows],
        accuracy: Sequence[Sequence[float]],
    ) -> None:
        self.model, self.parameters, self.forms = require_decoder(target, slug), parameters, forms
        self._target, self._width = target, len(forms[0])
        levels = range(1, len(forms) + 1)
        self._gains = gains(accuracy or [[UNKNOWN ** (level + rank) for rank in range(3)] for level in levels])
        self._courses: dict[int, Course] = {}
        self._guesses = Guesses(None)
        self._cost: VerifyCost | None = None
        self._state_bytes = self.model.config.hidden_size * self.model.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        own = self.forms[-1].states.nbytes
        return own + sum(course.states.nbytes for course in self._courses.values() if course.states is not None)

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        return len(requests) * len(self.forms) * self._state_bytes

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        config = self.model.config
        logits = self._guesses.scratch_bytes(len(requests) * len(self.forms), config.vocab_size)
        return logits + len(requests) * self.parameters.rows * config.hidden_size * torch.float32.itemsize

    def headroom(self, request: Request) -> int:
        return super().headroom(request) + self.parameters.rows

    def prepare(self) -> None:
        if self.parameters.sized and self._cost is None:
            self._cost = verify_cost(self._target.model, self._target.folder)

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        known = [request for request in requests if self._course(request).states is not None]
        trees = dict(zip([request.id for request in known], self._trees(known), strict=True))
        context = sum(len(request.tokens) for request in requests) / len(requests)
        return [
            self._cut(request, trees.get(request.id, Draft()), budget, self._price(request, context, len(requests)))
            for request, budget in zip(requests, budgets, strict=True)
        ]

    @torch.inference_mode()
    def _trees(self, requests: Sequence[Request]) -> list[Draft]:
        """The best trees of guesses for requests that have some."""
        if not requests:
            return []
        states = [self._states(request) for request in requests]
        logits = logits_of(self.model.head, torch.cat(states))
        self._guesses.begin(requests)
        found = self._guesses.levels(requests, list(map(len, states)), logits, self.parameters.ranks)
        drafts = [
            best_of_levels(levels[: request.stopper.left - 1], self.parameters.nodes)
            for request, levels in zip(requests, found, strict=True)
        ]
        for request, draft in zip(requests, drafts, strict=True):
            self._guesses.made_of_levels(request, draft)
        return drafts

    def _cut(self, request: Request, tree: Draft, budget: int, price: Callable[[int], float]) -> Draft:
        """What pays of a tree, with the rows behind it that draft next."""
        course = self._course(request)
        tree = tree.subset(range(min(len(tree), budget)))
        course.whole = tree
        chances = course.calibration.probabilities(tree)
        rows = allot(chances, tree.parents, self._gains, price, self.parameters.rows, self._width)
        draft = tree.subset(rows.nodes)
        # What stands behind the end of the context, or where nothing more may come, is of no use.
        room = min(self.model.config.max_positions - len(request.tokens), request.stopper.left - 2)
        for node, depth, prompts in zip(range(ROOT, len(draft)), (0, *draft.depths()), rows.prompts, strict=True):
            if (count := min(prompts, room - depth)) > 0:
                draft.probes.append(Probe.of(node, self.forms[count - 1]))
        return draft

    def _price(self, request: Request, context: float, batch: int) -> Callable[[int], float]:
        """What rows cost, in tokens that the request could have got in that time.

        Args:
            context: mean tokens of the batch's requests, of which there are `batch`, all with as many rows.
        """
        cost, course = self._cost, self._course(request)
        if cost is None:
            return lambda rows: 0.0
        plain = cost.of(batch, context, batch)
        pace = course.gained / course.spent
        return lambda rows: pace * (cost.of(batch * rows, context, batch) / plain - 1)

    def observe(self, request: Request, seen: Observation) -> None:
        course, node, row = self._course(request), seen.path[-1] if seen.path else ROOT, 0
        self._guesses.observe(request, seen)
        course.calibration.observe(course.whole, course.whole.judged(seen.tokens))
        if self._cost is not None:
            course.gained += len(seen.tokens)
            course.spent += self._cost.ratio(1 + seen.draft.rows, len(request.tokens))
        course.whole, course.states = Draft(), None
        for probe in seen.draft.probes:
            if probe.node == node:
                rows = seen.probe_taps[FINAL][row : row + len(probe.tokens)]
                # The head is linear: the mean of what several rows say of one place is what it says to their mean.
                course.states = rows.view(-1, self._width, rows.shape[1]).mean(1)
            row += len(probe.tokens)

    def end(self, request: Request) -> None:
        self._guesses.end(request)
        self._courses.pop(request.id, None)

    def _course(self, request: Request) -> Course:
        return self._courses.setdefault(request.id, Course())

    def _states(self, request: Request) -> Tensor:
        states = self._course(request).states
        assert states is not None
        return states
