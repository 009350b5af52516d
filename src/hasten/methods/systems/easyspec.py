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

Here all of a group is computed on one device, which takes as long as the exact model does: the drafts are those of the
paper's method, their cost is not. `critical_path` says what they would take on `parallel` devices. It assumes that
attention layers of a group take the time of one on its own device, that one gather per group brings their outputs
together, and that everything else stays on one device, in order. `python benchmarks/systems.py easyspec` measures its
terms, and acceptance by `parallel`.
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


@dataclass(frozen=True)
class EasySpecParameters(DraftModelParameters):
    """Parameters of the drafter.

    Attributes:
        parallel: attention layers that read one input; 1 is the exact draft model.
        calibration: whether what fuzzy passes left is dropped before each draft. Without it acceptance falls as the
            text grows: the paper's ablation.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "easyspec"

    parallel: int = 4
    calibration: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.parallel <= 16:
            raise UserError("easyspec: parallel must be between 1 and 16")


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


@dataclass(frozen=True)
class LayerSeconds:
    """What parts of the draft model take: attention and MLP of a layer, the head, a gather between devices."""

    attention: float
    mlp: float
    head: float
    gather: float = 0.0


def critical_path(seconds: LayerSeconds, layers: int, parallel: int) -> float:
    """Seconds per drafted token on `parallel` devices: one attention and perhaps a gather per group, all MLPs."""
    grouped = groups(layers, parallel)
    gathers = sum(len(group) > 1 for group in grouped)
    return len(grouped) * seconds.attention + gathers * seconds.gather + layers * seconds.mlp + seconds.head


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
        self._parallel, self._calibrated = parameters.parallel, parameters.calibration
        self._latest: dict[int, Growth] = {}
        if not isinstance(self.model, Decoder) or any(type(layer) is not Layer for layer in self.model.layers):
            raise UserError(
                "easyspec: needs a draft model of plain pre-norm layers, whose parts it puts in another order"
            )

    def drafted(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        assert isinstance(self.model, Decoder)
        return fuzzy(self.model, rows, wanted, self._parallel)

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
