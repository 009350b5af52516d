"""Prophet: stop when the answer has converged, and fill what is left at once.

"Diffusion Language Models Know the Answer Before Decoding" (2508.19982). Before every commit the mean gap between the two
largest logits over an answer region is compared with a threshold that falls with progress (steps over the budget of one
step per position); once it is reached, every mask of the canvas becomes its current prediction. Thresholds are in
units of raw logits, so that they depend on the model.

The released rule needs to know where the answer is: here the `answer` positions behind the last decided one that is
before a mask, of those not predicted to be padding (end of text, which is certain from the first step on and would
drown the rest); all masked ones with `answer=0`. With `quantile` above 0 that quantile of the gaps counts instead of their mean.
Until then, it commits one token per pass. Exactness: lossy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.engine import Request, Target, View, register
from hasten.errors import require
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters

MIDDLE, LATE = 0.33, 0.67
"""Progress at which the next threshold holds."""
