"""FFN-SkipLLM: every row attends in every layer, and passes by feed-forward layers that would hardly change it.

"FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping", 2024, arXiv 2404.03865.
In the middle of a deep model the residual stream keeps its direction through a feed-forward layer; in its first and
last layers, the cold regions, it does not. So between them each row is watched: once a layer's result, added to the
stream, has a cosine of `threshold` with the stream before it, the row passes by the next `run` feed-forward layers; the
one behind these is a test again. Keys and values are made in all layers, so the cache has no holes. Which layers, and
which threshold gives the share that was asked for, is measured on the model once (`cold_regions.py`) and kept on disk.

Exactness: lossy. Nothing is verified. `docs/skipping.md` has figures.

Decisions where the paper leaves room:

- *Warm-up* counts generated tokens; the prompt, which the model itself reads, goes through all layers anyhow.
- *Batches.* Each row decides for itself; those that go through a layer are computed there together. A row that passes
  by saves time only where all of its batch do, or where rows are what limits the machine.
- *Outliers.* A few channels of a trained model may be so large that they alone make the cosine. `outliers` leaves the
  largest ones out of it.
- The share is of all feed-forward layers, the cold ones included, as rows behind the warm-up pass them by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.engine import Approximation, Knob, Request, Target, register
from hasten.errors import require
from hasten.methods.skipping.cold_regions import regions
from hasten.methods.skipping.layers import gated, require_layers
from hasten.model import Rows


@dataclass(frozen=True)
class FfnSkipLlmParameters:
    """Parameters.

    Attributes:
        ratio: share of the feed-forward layers that rows behind the warm-up should pass by.
        run: how many a row passes by before the next test; more are fewer tests, and coarser.
        warmup: generated tokens that go through all layers.
        outliers: channels, the largest ones, that are left out of cosines.
        threshold: least cosine; 0: the calibrated one. Above 1 nothing is skipped.

    Raises:
        UserError: out of range.
    """

    ratio: float = 0.25
    run: int = 2
    warmup: int = 25
    outliers: int = 0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            (0 < self.ratio < 1, "ratio must be between 0 and 1"),
            (self.run >= 1, "run must be at least 1"),
            (self.warmup >= 0, "warmup must not be negative"),
            (0 <= self.outliers <= 64, "outliers must be between 0 and 64"),
            (self.threshold >= 0, "threshold must not be negative"),
        )
        require(checks, "ffn-skipllm")


@register(
    "ffn-skipllm",
    family="skipping",
    exactness="lossy",
    paper="2404.03865",
    title="FFN-SkipLLM: layers that change little are passed by",
    parameters=FfnSkipLlmParameters,
    knob=Knob("ratio", (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)),
    command="hasten sweep --model tiny --methods ffn-skipllm --suite tasks --per-task 4 --temperature 0",
)
class FfnSkipLlm(Approximation):
    """Gates the model's passes.

    Raises:
        UserError: a model that is not made of attention layers only, has no warm region, or one that is too small for
            the ratio.

    Attributes:
        regions: what the calibration found.
        passed: feed-forward layers that rows passed by so far; `rows` of them.
    """

    def __init__(self, target: Target, parameters: FfnSkipLlmParameters) -> None:
        self.model, self.parameters = require_layers(target, "ffn-skipllm"), parameters
        self.regions = regions(target, self.model, parameters.ratio, parameters.run, parameters.outliers)
        gate = self.regions.gate(parameters.run, self.model.config.hidden_size)
        self.gate = replace(gate, threshold=parameters.threshold) if parameters.threshold else gate
        self.passed = self.rows = 0

    @property
    def memory_bytes(self) -> int:
        return self.gate.channels.nbytes

    def forward(self, requests: Sequence[Request], rows: Rows, wanted: Sequence[int]) -> Tensor:
        behind = [request.read - request.prompt_length for request in requests]
        may = torch.tensor([count >= self.parameters.warmup for count in behind])
        logits, passed = gated(self.model, rows, wanted, self.gate, may)
        self.rows += len(requests)
        self.passed += int(passed.sum())
        return logits
