"""What a request reports beside its tokens: what it cost, and how likely its tokens were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TokenKind = Literal["plain", "accepted", "correction"]
"""How a token came: without a draft, from a draft (or with others in one look at a canvas), or as the target's own one
at the end of a draft."""


@dataclass
class Statistics:
    """What a request cost.

    Rows and forwards of the prompt are counted apart from those of decoding; `recalled_rows` of it were in the cache
    already. `steps` are forwards that gave tokens, or worked on a canvas; `tokens` counts them up to end of text.
    Seconds of a batch's shared forward are counted in full for each of its requests.
    """

    steps: int = 0
    tokens: int = 0
    prompt_rows: int = 0
    recalled_rows: int = 0
    rows: int = 0
    proposed: int = 0
    accepted: int = 0
    accepted_per_step: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    forward_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability (natural) of the chosen token, and of the likeliest ones, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
