"""The forward passes of a step: one of the model, and one of each approximation that has rows in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.engine.drafting.approximation import Approximation
from hasten.engine.drafting.glimpses import Glimpses
from hasten.engine.job import Job
from hasten.engine.packing import packed, wanted_taps
from hasten.engine.placement import Placed
from hasten.engine.sampling.sampler import likeliest_if_finite
from hasten.model import Model, Rows, Taps


@dataclass
class Computed:
    """What a pass gave.

    Attributes:
        placed: who was in it, in the order of its spans.
        logits: float32 [wanted rows, vocabulary], all requests' one behind the other.
        best, finite: of each of these rows, as `likeliest_if_finite` gives them.
        seconds: that it took.
        failed: requests whose drafters failed as they looked into it.
    """

    placed: Sequence[Placed]
    rows: Rows
    taps: Taps | None
    logits: Tensor
    best: list[int]
    finite: list[bool]
    seconds: float
    failed: list[tuple[Job, Exception]]


def approximated(placed: Placed) -> Approximation | None:
    """What computes a request's rows in the model's place; None where the model does, as it reads all prompts."""
    request, drafter = placed[0].request, placed[0].request.drafter
    return drafter if isinstance(drafter, Approximation) and request.read >= request.prompt_length else None


def together(placed: Sequence[Placed]) -> list[list[Placed]]:
    """Who shares a pass."""
    passes: dict[int, list[Placed]] = {}
    for each in placed:
        passes.setdefault(id(approximated(each)), []).append(each)
    return list(passes.values())


def compute(model: Model, placed: Sequence[Placed]) -> Computed:
    """One pass."""
    started = time.perf_counter()
    rows, wanted = packed(placed, model.config.hidden_size, model.device)
    taps, own = wanted_taps(placed), approximated(placed[0])
    glimpses = Glimpses(placed, rows.spans, taps)
    if own is None:
        logits = model.forward(rows, wanted, taps)
    else:
        logits = own.forward([scheduled.request for scheduled, _ in placed], rows, wanted)
    if model.config.diffusion is not None:
        # The mask is not a word: a text that says it would never be finished.
        logits[:, model.config.diffusion.mask_id] = -torch.inf
    best, finite = likeliest_if_finite(logits)
    return Computed(placed, rows, taps, logits, best, finite, time.perf_counter() - started, glimpses.failed)
