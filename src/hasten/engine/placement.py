"""Room in the cache for a step's rows: drafts give way first, then younger requests, which are read again later."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.cache import Cache, Prefixes
from hasten.engine.drafting.draft import Draft
from hasten.engine.drafting.speculation import Speculation
from hasten.engine.job import Job
from hasten.engine.passage import Passage
from hasten.engine.scheduler import Scheduled, Scheduler
from hasten.errors import UserError

Placed = tuple[Scheduled, Passage]
"""Who takes part in a step, and with which rows."""


class Placement:
    """Decides who takes part in a step.

    Args:
        scheduler: whose running requests give way to each other.
        cache: that their slots are in.
        prefixes: texts that give way before any of them.

    Attributes:
        late: requests whose drafts wait for the next pass.
    """

    def __init__(self, scheduler: Scheduler, cache: Cache, prefixes: Prefixes) -> None:
        self._scheduler, self._cache, self._prefixes = scheduler, cache, prefixes
        self.late: list[Job] = []

    def place(self, plan: Sequence[Scheduled]) -> tuple[list[Placed], tuple[Job, UserError] | None]:
        """Who of the scheduled requests takes part, and one for which there never will be room, if that shows."""
        placed: dict[int, Placed] = {}
        refused: dict[int, tuple[Job, UserError]] = {}
        drafted, late = 0, self.late
        self.late = []
        for scheduled in sorted(plan, key=lambda each: each.request not in late) if late else plan:
            request = scheduled.request
            draft = 0 if scheduled.piece else request.decoding.drafted
            if draft and drafted and drafted + draft > self._scheduler.limits.draft_rows:
                self.late.append(request)
                continue
            drafted += draft
            while request in self._scheduler.running:
                try:
                    passage = request.decoding.passage(request, scheduled.piece)
                    self._make_room(request, len(passage.tokens))
                    placed[request.id] = scheduled, passage
                    break
                except UserError as error:
                    if self._prefixes.evict():
                        continue
                    decoding = request.decoding
                    if isinstance(decoding, Speculation) and decoding.drafted and not decoding.draft.trusted:
                        # Before anybody makes place for it.
                        decoding.draft = Draft()
                        continue
                    victim = self._victim(request)
                    if victim is None:
                        refused[request.id] = request, error
                        break
                    placed.pop(victim.id, None)
                    self.preempt(victim)
        # Where nobody is placed, nobody will give back what the youngest of them waits for.
        return list(placed.values()), refused[max(refused)] if refused and not placed else None

    def preempt(self, request: Job) -> None:
        """Have a running request wait; its text will be read again."""
        self._scheduler.preempt(request)
        request.sequence.release()
        request.sequence, request.read = request.context.sequence(self._cache), 0

    def _make_room(self, request: Job, rows: int) -> None:
        """Room for a pass; when a request begins, for all that is known of it, and what may come as far as that fits.

        Raises:
            UserError: the cache is full.
        """
        if request.read <= request.prompt_length:
            begun_at = (0, request.statistics.recalled_rows, request.prompt_length)
            if request.read in begun_at if isinstance(request.decoding, Speculation) else not request.sequence.length:
                known = max(rows, request.decoding.slots(request))
                request.sequence.reserve(known, request.drafter.headroom(request))
        if self._cache.limit_bytes is not None:
            request.sequence.make_room(rows)

    def _victim(self, request: Job) -> Job | None:
        """Who gives back its slots and is read again, to make place for a request: the youngest, or that one itself.

        One that only begins takes nobody's place. One that runs alone begins anew if that is all it takes: a block that
        is outgrown needs place beside its successor.
        """
        running = self._scheduler.running
        others = [each for each in running if each is not request and each.sequence.nbytes()]
        again = [each for each in (*others, request) if isinstance(each.decoding, Speculation)]
        if others and request.sequence.length and again:
            return max(again, key=lambda each: each.id)
        fits = others or self._cache.fits(len(request.tokens) + 1)
        return request if request in again and fits and (others or request.sequence.length) else None
