"""What the steps of Mirror-SD take, term by term, beside the paper's law, and how often its candidates were right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of verifications, summed, and how the windows behind them came.

    Attributes:
        steps, windows, hits: verifications, of how many requests, and how often a candidate was right.
        places: how often the one that was right stood at which place among its row's candidates, from 0 on.
        below, looking, above: of the target: the layers below the middle; the candidates; the rest of the step.
        rolling, fallback: of the drafter: chains behind candidates; windows begun anew.
        passes: of the drafter that were to say something.
        overlapped: the larger of `above` and `rolling`, step by step.
        waiting: until the next window was there.
        step: from one window to the next.
    """

    steps: int = 0
    windows: int = 0
    hits: int = 0
    below: float = 0.0
    looking: float = 0.0
    above: float = 0.0
    rolling: float = 0.0
    fallback: float = 0.0
    passes: int = 0
    overlapped: float = 0.0
    waiting: float = 0.0
    step: float = 0.0
    places: Counter[int] = field(default_factory=Counter)

    @property
    def law(self) -> float:
        """What the steps take by the paper's law, without the rendezvous: to be compared with `step`."""
        return self.below + self.looking + self.overlapped + self.fallback

    def hit_rate(self, width: int) -> float:
        """The share of windows that so many candidates per row would have foreseen, or all if there were fewer.

        The candidates of a narrower drafter are the first ones of a wider one, and both verify the same windows.
        """
        return sum(count for place, count in self.places.items() if place < width) / max(1, self.windows)
