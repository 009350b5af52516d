"""EasySpec: several attention layers of the draft model at once, on devices that would idle, and repaired afterwards.

"EasySpec: Layer-Parallel Speculative Decoding for Efficient Multi-GPU Utilization", 2025, arXiv 2502.02493. A draft
model is fastest on one device, while the target's other devices wait. It need not be exact, since all is verified: so
the attention of up to `parallel` consecutive layers reads one input, what enters the first of them, and is computed at
the same time (*fuzzy*). The MLPs stay in order, on the running sum. First and last layer stand alone.

    u = x;  for each layer i of the group:  u = u + attention_i(norm(x));  u = u + mlp_i(norm(u))

What a fuzzy pass leaves in the drafter's cache would add up. So before each draft it is dropped, and the exact model
reads the tokens that came (*bonus calibration*), which gives the first drafted token as well.

Exactness: lossless. Where a draft is sampled, the distributions that it was sampled from are fuzzy, and are what is
handed over.

A device here is a core. Where the draft model runs natively, `workers` threads compute a group, an attention layer
each, and MLPs and head together (`model/native/grouped.py`); with one worker, the layers of a group have their turns,
to the same bits. Elsewhere the model's pieces are composed (`fuzzy`). `critical_path` says what a drafted token should
take, from what its parts take; `python benchmarks/systems.py easyspec` has both beside each other, and acceptance by
`parallel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.engine import ROOT, Request, Target, register
from hasten.errors import UserError
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters, Levels
from hasten.methods.drafters.small_model import Growth
from hasten.model import Decoder, Rows
from hasten.model.layers import Layer
from hasten.model.native.grouped import Spent, grouped, runs_grouped
from hasten.model.threads import cores


@dataclass(frozen=True)
class EasySpecParameters(DraftModelParameters):
    """Parameters of the drafter.

    Attributes:
        parallel: attention layers that read one input; 1 is the exact draft model.
        workers: threads that compute a group's attention; 0: as many as the process computes with.
        calibration: whether what fuzzy passes left is dropped before each draft. Without it acceptance falls as the
            text grows: the paper's ablation.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "easyspec"

    parallel: int = 4
    workers: int = 0
    calibration: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.parallel <= 16:
            raise UserError("easyspec: parallel must be between 1 and 16")
        if not 0 <= self.workers <= cores():
            raise UserError(f"easyspec: workers must be between 1 and {cores()}, the cores that there are, or 0")


def groups(layers: int, parallel: int) -> list[range]:
    """Consecutive layers whose attention is computed at once: the first and the last one stand alone."""
    between = [range(start, min(start + parallel, layers - 1)) for start in range(1, layers - 1, parallel)]
    return [range(1), *between, *([range(layers - 1, layers)] if layers > 1 else [])]


@torch.inference_mode()
def fuzzy(model: Decoder, rows: Rows, wanted: Sequence[int] | None, parallel: int) -> Tensor:
    """`Model.forward` with the attention of each group on what enters the group."""
    step = model.start(rows)
    x = model.embed(rows)
    for group in groups(len(model.layers), parallel):
        entered = x
        for layer in (model.layers[index] for index in group):
            mixed = layer.mixer.forward_add(layer.mixer_norm.forward(entered), x, layer.index, step)
            x = layer.feed(mixed, step)
    return model.logits(x, wanted)


def critical_path(spent: Spent, sizes: Sequence[int], devices: int) -> float:
    """Seconds of a fuzzy pass: of each group the longest that a device takes for its attention layers, then all MLPs in
    order, the head.

    Args:
        spent: what the parts take, each by itself.
        sizes: of the groups, as of `grouped`.
        devices: that share a group's layers out between them, one after the other.
    """
    seconds, first = sum(spent.feed_forward) + spent.head, 0
    for size in sizes:
        group = spent.attention[first : first + size]
        seconds += max(sum(group[device::devices]) for device in range(devices))
        first += size
    return seconds


@register(
    "easyspec",
    family="systems",
    exactness="lossless",
    paper="2502.02493",
    title="EasySpec: a draft model's attention in parallel",
    parameters=EasySpecParameters,
)
class EasySpec(DraftModel):
    """Drafts for the whole batch together: one fuzzy pass of the small model per level.

    Raises:
        UserError: the small model has layers of another kind: only x + mixer(norm(x)), then x + mlp(norm(x)) can be
            taken apart so.
    """

    plain_tokens = False

    def __init__(self, target: Target, parameters: EasySpecParameters) -> None:
        super().__init__(target, parameters)
        self._parallel, self._workers = parameters.parallel, parameters.workers
        self._calibrated = parameters.calibration
        self._latest: dict[int, Growth] = {}
        if not isinstance(self.model, Decoder) or any(type(layer) is not Layer for layer in self.model.layers):
            raise UserError(
                "easyspec: needs a draft model of plain pre-norm layers, whose parts it puts in another order"
            )

    def drafted(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        assert isinstance(self.model, Decoder)
        if not runs_grouped(self.model, rows):
            return fuzzy(self.model, rows, wanted, self._parallel)
        sizes = [len(group) for group in groups(len(self.model.layers), self._parallel)]
        return grouped(self.model, rows, wanted, sizes, self._workers)[0]

    def start(self, request: Request, budget: int) -> Levels:
        growth = super().start(request, budget)
        if not self._calibrated:
            if request.id in self._latest:
                self._keep(request, self._latest[request.id])
            self._latest[request.id] = growth
        return growth

    def _keep(self, request: Request, drafted: Growth) -> None:
        """Leave fuzzy keys and values of accepted tokens where they are."""
        below, node, rows = drafted.draft.children(), ROOT, []
        for token in request.tokens[drafted.matching.start :]:
            children = [child for child in below.get(node, ()) if drafted.draft.tokens[child] == token]
            row = drafted.row(children[0]) if children else None
            if row is None:
                break
            rows.append(row)
            node = children[0]
        self._sequences.of(request).commit(rows)

    def end(self, request: Request) -> None:
        super().end(request)
        self._latest.pop(request.id, None)
