"""A request's way to its tokens: what it asks of a step, and what it makes of the answer.

There are two: `Speculation` of the next tokens, and `Filling` of a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from hasten.engine.drafting.verification import Verdict
from hasten.engine.passage import Passage
from hasten.engine.report import TokenKind
from hasten.engine.request import Request
from hasten.model import Taps


class Answer(NamedTuple):
    """What a forward pass made of a passage.

    Attributes:
        logits: float32 [wanted rows, vocabulary].
        best: the argmax of each of these rows.
        finite: whether a token can be chosen by each of them (`hasten.engine.sampling.sampler.likeliest_if_finite`).
        taps: the hidden states of all rows of the passage that the request's drafter asked for; None where it asked
            for none.
        rows: of the whole pass, the other requests' included.
        verdict: on the draft, where it was asked for with those of the other requests.
    """

    logits: Tensor
    best: list[int]
    finite: list[bool]
    taps: Taps | None
    rows: int
    verdict: Verdict | None = None


class Decoding(Protocol):
    """How a request comes to its tokens. The engine applies the stopping rules, and reports.

    In each step: `passage`, a forward pass, `receive`, the stopping rules, `keep`; and `observe`, if it goes on.
    """

    @property
    def exhausted(self) -> bool:
        """Whether nothing more can come, whatever the stopping rules say."""

    @property
    def drafted(self) -> int:
        """Rows of the next passage that others made up, to be looked at beside the request's own."""

    def backlog(self, request: Request) -> int:
        """Tokens still to be read before new ones come, in pieces of any size; 0 where the passages say it all."""

    def slots(self, request: Request) -> int:
        """Cache slots that it will take at the least, from what the model has read on."""

    def passage(self, request: Request, piece: int) -> Passage:
        """The rows of the next pass.

        Args:
            piece: tokens of the backlog that it reads.
        """

    def receive(self, request: Request, answer: Answer) -> list[int]:
        """What the passage gave: new tokens in order, before stopping rules; perhaps none."""

    def keep(self, request: Request, tokens: Sequence[int]) -> list[TokenKind]:
        """These of the new tokens belong to the output, and how they came; they are not in `request.tokens` yet."""

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """They are now, and the request goes on."""

    def close(self) -> None:
        """The request is over."""
