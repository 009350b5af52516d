"""What was measured, kept in one file after every visit, and the figures made of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from catalogue import HASTEN

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.files import write_text

PLAIN = "plain"


@dataclass(frozen=True)
class Way:
    """One way to decode: a peer, its precision, how many prompts at a time, and `plain` or its own speculation."""

    peer: str
    precision: str
    batch: int
    method: str


@dataclass(frozen=True)
class Reading:
    """A prompt of so many tokens, read alone for its first token, by a peer in a precision."""

    peer: str
    precision: str
    length: int

    @property
    def way(self) -> Way:
        """As what it is listed where it cannot be done."""
        return Way(self.peer, self.precision, 1, f"prompt of {self.length}")


@dataclass(frozen=True)
class Visit:
    """All prompts, once, in one way.

    Attributes:
        prompts, tokens, seconds: over all batches.
        prefill_seconds: until the first tokens, as far as the peer tells.
        overhead: share of time outside the peer, as far as its worker drives the loop.
        prefix: mean share of an answer before the first token that differs from the reference's.
        same: share of positions that have the reference's token.
        gap: logits between the reference's two likeliest tokens where an answer first differs: the widest, None without
            a difference. A narrow one is a tie that rounding decides.
    """

    round: int
    prompts: int
    tokens: int
    seconds: float
    prefill_seconds: float | None
    overhead: float | None
    prefix: float
    same: float
    gap: float | None

    @property
    def speed(self) -> float:
        """New tokens per second, prompts included."""
        return self.tokens / self.seconds

    @property
    def decode_speed(self) -> float | None:
        """Tokens per second behind the first ones, which come with the prompts."""
        if self.prefill_seconds is None or self.tokens == self.prompts:
            return None
        return (self.tokens - self.prompts) / (self.seconds - self.prefill_seconds)


def agreement(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Shares of the answers that agree with the reference: up to the first difference, and position by position."""
    prefixes, same = [], []
    for answer, expected in zip(answers, reference, strict=True):
        equal = [one == other for one, other in zip(answer, expected, strict=True)]
        prefixes.append((equal.index(False) if False in equal else len(equal)) / len(equal))
        same.append(sum(equal) / len(equal))
    return statistics.mean(prefixes), statistics.mean(same)


def widest_gap(
    answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]]
) -> float | None:
    """See `Visit.gap`; answers are those of the reference's first prompts."""
    found = []
    for answer, expected, gap in zip(answers, reference, gaps, strict=False):
        first = next(
            (place for place, pair in enumerate(zip(answer, expected, strict=True)) if len(set(pair)) > 1), None
        )
        if first is not None:
            found.append(gap[first])
    return max(found, default=None)


class Results:
    """The document of a comparison.

    Args:
        file: where it is kept; None keeps nothing. What an earlier run left there is taken up.
        settings: what the measurements depend on.

    Raises:
        UserError: the file is of other settings, or no document.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.visits: dict[Way, dict[int, Visit]] = {}
        self.readings: dict[Reading, dict[int, float]] = {}
        self.divergences: dict[tuple[str, str], dict[str, Any]] = {}
        self.reference: list[list[int]] = []
        self.gaps: list[list[float]] = []
        self.unavailable: dict[Way, str] = {}
        self.versions: dict[str, str | None] = {}
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            document = json.loads(file.read_text())
            settings, reference, gaps = document["settings"], document["reference"], document["gaps"]
            readings = [(Reading(**entry["reading"]), entry["seconds"]) for entry in document["readings"]]
            divergences = {(entry.pop("peer"), entry.pop("precision")): entry for entry in document["divergences"]}
            visits = [(Way(**entry["way"]), Visit(**entry["visit"])) for entry in document["visits"]]
            versions, unavailable = document["versions"], document["unavailable"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no result of this comparison: {error}") from error
        if settings != self.settings:
            changed = [name for name in self.settings if settings.get(name) != self.settings[name]]
            raise UserError(f"{file} was measured with another {', '.join(changed)}: choose another folder")
        self.reference, self.gaps, self.versions, self.divergences = reference, gaps, versions, divergences
        self.readings = {reading: {int(number): taken for number, taken in own.items()} for reading, own in readings}
        for entry in unavailable:
            reason = entry.pop("reason")
            self.unavailable[Way(**entry)] = reason
        for way, visit in visits:
            self.add(way, visit)

    def add(self, way: Way, visit: Visit) -> None:
        """Enter a visit."""
        self.visits.setdefault(way, {})[visit.round] = visit

    def seconds(self, reading: Reading) -> dict[int, float]:
        """Until the first token, by round; what is entered there is kept."""
        return self.readings.setdefault(reading, {})

    def done(self, way: Way, number: int) -> bool:
        """Whether a round of this way is there."""
        return number in self.visits.get(way, {})

    def save(self) -> None:
        """Write everything, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        if self.file is None:
            return
        write_text(self.file, dumps(self.document(), indent=1))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "settings": self.settings,
            "versions": self.versions,
            "rows": self.rows(),
            "ratios": self.ratios(),
            "first_tokens": self.first_tokens(),
            "divergences": [
                {"peer": peer, "precision": precision, **found} for (peer, precision), found in self.divergences.items()
            ],
            "unavailable": [{**asdict(way), "reason": reason} for way, reason in self.unavailable.items()],
            "reference": self.reference,
            "gaps": self.gaps,
            "readings": [
                {"reading": asdict(reading), "seconds": seconds} for reading, seconds in self.readings.items()
            ],
            "visits": [
                {"way": asdict(way), "visit": asdict(visit)}
                for way, visits in self.visits.items()
                for visit in visits.values()
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Medians over the rounds of each way."""
        return [
            {
                **asdict(way),
                "rounds": len(visits),
                "tokens_per_second": _median([visit.speed for visit in visits.values()]),
                "slowest": round(min(visit.speed for visit in visits.values()), 2),
                "fastest": round(max(visit.speed for visit in visits.values()), 2),
                "decode_tokens_per_second": _median([visit.decode_speed for visit in visits.values()]),
                "overhead": _median([visit.overhead for visit in visits.values()], 4),
                "prefix_share": _median([visit.prefix for visit in visits.values()], 4),
                "same_share": _median([visit.same for visit in visits.values()], 4),
                "gap": max((visit.gap for visit in visits.values() if visit.gap is not None), default=None),
                **{key: self.divergences.get((way.peer, way.precision), {}).get(key) for key in ("kl", "top1")},
            }
            for way, visits in self.visits.items()
        ]

    def first_tokens(self) -> list[dict[str, Any]]:
        """Per peer, precision and length, medians over rounds.

        Of hasten's also `ratio`, the best peer's time over its own: as in `ratios`, by rounds that both have.
        """
        return [
            {
                **asdict(reading),
                "rounds": len(seconds),
                "ms": round(statistics.median(seconds.values()) * 1e3, 3),
                "tokens_per_second": round(reading.length / statistics.median(seconds.values()), 2),
                "ratio": self._reading_ratio(reading) if reading.peer == HASTEN else None,
            }
            for reading, seconds in self.readings.items()
            if seconds
        ]

    def _reading_ratio(self, own: Reading) -> float | None:
        others = [
            seconds
            for reading, seconds in self.readings.items()
            if seconds and reading.peer != HASTEN and (reading.precision, reading.length) == (own.precision, own.length)
        ]
        if not others:
            return None
        best, mine = min(others, key=lambda seconds: statistics.median(seconds.values())), self.readings[own]
        return _median([best[number] / mine[number] for number in mine if number in best], 3)

    def ratios(self) -> list[dict[str, Any]]:
        """hasten over the best peer, per precision and batch: both plain, and each in its best way of all.

        A ratio is the median of the ratios of rounds that both have.
        """
        result = []
        for precision, batch in dict.fromkeys((way.precision, way.batch) for way in self.visits):
            ways = [way for way in self.visits if (way.precision, way.batch) == (precision, batch)]
            for kind in ("plain", "best"):
                fit = [way for way in ways if kind == "best" or way.method == PLAIN]
                own = max((way for way in fit if way.peer == HASTEN), key=self._speed, default=None)
                peer = max((way for way in fit if way.peer != HASTEN), key=self._speed, default=None)
                if own is None or peer is None:
                    continue
                mine, theirs = self.visits[own], self.visits[peer]
                paired = [mine[number].speed / theirs[number].speed for number in mine if number in theirs]
                if not paired:
                    continue
                result.append(
                    {
                        "precision": precision,
                        "batch": batch,
                        "kind": kind,
                        "hasten": own.method,
                        "peer": peer.peer,
                        "method": peer.method,
                        "ratio": _median(paired, 3),
                    }
                )
        return result

    def _speed(self, way: Way) -> float:
        return statistics.median(visit.speed for visit in self.visits[way].values())


def _median(values: Sequence[float | None], digits: int = 2) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), digits) if known else None
