"""The interface of a drafter: what a method author writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hasten.engine.drafting.draft import MAX_DRAFT, Draft
from hasten.engine.request import Request
from hasten.model.taps import Site, Taps


@dataclass
class Observation:
    """What one verification showed.

    Attributes:
        draft: as it was verified (clamped).
        path: accepted nodes, from the root's child down.
        tokens: what was appended to the request: accepted tokens, then the target's own (less what stopping cut off).
        logits: float32 [len(draft) + 1, vocabulary] on the model's device: the root's row, then one per node, rejected
            ones included.
        taps: hidden states of the same rows, where the drafter asked for any.
        probes: float32 [rows of the draft's probes that are heard, vocabulary], one probe's behind the other's.
        probe_taps: the hidden states of all rows of the draft's probes.
        rows: of the whole step: all requests' drafts and prompts.
    """

    draft: Draft
    path: list[int]
    tokens: list[int]
    logits: Tensor
    taps: dict[tuple[Site, int], Tensor]
    probes: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    probe_taps: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    rows: int = 0


class Drafter:
    """Proposes tokens. One object serves all requests of an engine that use the same method and parameters.

    Only `propose` must be written. State kept per request belongs under `request.id`, is created in `begin` (or on
    demand) and dropped in `end`; state that outlives requests must be bounded.
    """

    alone: ClassVar[bool] = False
    """Whether it must be the whole method, not a part of a composition."""

    rations: bool = False
    """Whether those that run are asked about, too, before every step (`admits`)."""

    reference: str = "plain"
    """The method of one token per pass whose tokens it gives if it is lossless, and is compared with if it is not."""

    taps: tuple[tuple[Site, int], ...] = ()
    """Hidden states that `observe` and `observe_prompt` are given."""

    early: int = 0
    """A layer of the target, not its first: `glimpse` is given what enters it, while the pass goes on. 0: none."""

    @property
    def reads_whole(self) -> bool:
        """Whether it must be shown all rows of a prompt: then none is taken from what an earlier text left."""
        return bool(self.taps)

    @property
    def memory_bytes(self) -> int:
        """Bytes of state held now (tables, caches, own weights; not those of the target), for reports and budgets."""
        return 0

    @property
    def weights(self) -> Mapping[int, int]:
        """Bytes of those weights in `memory_bytes` that other drafters may hold, too, by the `id` of what they are."""
        return {}

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        """Bytes that `memory_bytes` grows by, at most, when drafts for these requests are begun, or verified.

        Args:
            requests: that will be proposed for, or shown.
            rows: of a verification that will be shown; 0 before drafting.
        """
        return 0

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        """Bytes that drafts of at most so many nodes for each of these requests take for a while, at most.

        While they are made and while it is shown what became of them, beside `memory_bytes`. What the drafts hold until
        they are verified is part of it.
        """
        return 0

    def headroom(self, request: Request) -> int:
        """Cache slots to set aside for a request's output: what it may still produce, within reason, and a draft."""
        return min(request.stopper.left, 512) + MAX_DRAFT

    def admits(self, request: Request) -> bool:
        """Whether a request may take part in the next step. One that waits starts then.

        With `rations`, one that runs and may not gives its slots back, and waits to be read again.

        Raises:
            UserError: one that runs never will.
        """
        return True

    def prepare(self) -> None:
        """Do what takes long and steps would wait for, such as measuring; called before each request is added.

        Other threads may be taking steps meanwhile, also with this drafter.
        """

    def begin(self, request: Request) -> None:
        """A request starts; `request.tokens` is its prompt."""

    def propose(self, request: Request, budget: int) -> Draft:
        """A draft of at most `budget` nodes below `request.tokens[-1]`; may be empty, and is clamped anyway.

        Not every step asks: other drafters may take turns, and `observe` then shows what they drafted.
        """
        raise NotImplementedError

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        """Drafts for a whole batch; override where a model can draft for all at once."""
        return [self.propose(request, budget) for request, budget in zip(requests, budgets, strict=True)]

    def glimpse(self, requests: Sequence[Request], drafts: Sequence[Draft], states: Sequence[Tensor]) -> None:
        """Drafts are being verified, and their pass has come to the layer `early`; it waits until this returns.

        Where the engine cannot look into a pass it is called when that is over. It must run no model in this thread:
        the target is at work there.

        Args:
            requests: those of this drafter that are verified.
            drafts: of each, as it is verified; perhaps empty.
            states: of each, what enters the layer, [nodes + 1, hidden] in the target's dtype: the root's row first.
        """

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        """Prompt rows `start ..` have been processed (in chunks); `taps` holds exactly those rows.

        Rows before the first `start` were in the cache already, and are never shown; one that `reads_whole` sees all.
        """

    def observe(self, request: Request, seen: Observation) -> None:
        """A step of the request was verified and committed.

        Not every step is shown to a drafter without taps: `request.tokens` has what was committed meanwhile.
        """

    def end(self, request: Request) -> None:
        """The request is over, however it ended."""
