"""The comparison: load the peers of a precision, then compare predictions, read prompts and decode, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from catalogue import PEERS, Peer, needs_draft
from environments import Unavailable, converted, install, version
from process import Process
from prompts import beginnings, of_length
from reference import Reference
from results import PLAIN, Reading, Results, Visit, Way, agreement, widest_gap
from workers.protocol import Settings

from hasten.bench.divergence import Divergence

Item = TypeVar("Item")

ROOM = 16
"""Tokens of context beyond what is needed: drafts reach further than answers."""
SHORT = 512
"""Tokens of prompts that a visit reads at least: short ones are read several times."""


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        checkpoint, draft: Hugging Face folders, or GGUF files.
        prompts: token ids.
        lengths: of the prompts whose first token is waited for.
        predictions: rows of the prompts on which predictions are compared with the reference's, at most; 0 for none.
        batch_count: batches of one size that a visit decodes at most; None takes as many as the prompts fill.
        timeout: seconds that a peer may take to convert, to load and for each batch.
        logs: folder for what workers print.
    """

    checkpoint: Path
    draft: Path | None
    prompts: list[list[int]]
    lengths: Sequence[int]
    predictions: int
    max_tokens: int
    peers: Sequence[str]
    precisions: Sequence[str]
    batches: Sequence[int]
    batch_count: int | None
    speculation: bool
    rounds: int
    threads: int
    timeout: float
    logs: Path

    def ways(self, precision: str, batch: int) -> list[Way]:
        """All ways to decode of one precision and batch size."""
        ways = []
        for name in self.peers:
            peer = PEERS[name]
            methods = [PLAIN, *(peer.methods if self.speculation and not (peer.alone and batch > 1) else ())]
            ways += [Way(name, precision, batch, method) for method in methods if self._possible(peer, method)]
        return [way for way in ways if precision in self._readable(PEERS[way.peer])]

    def _readable(self, peer: Peer) -> Sequence[str]:
        """The precisions in which a peer can hold this checkpoint."""
        return peer.gguf if self.checkpoint.is_file() else peer.precisions

    def idle(self) -> dict[Way, str]:
        """Peers that take no part, and why: they read no GGUF file, or hold it in no precision that is asked for."""
        reasons = {}
        for name in self.peers:
            own = self._readable(PEERS[name])
            if set(own) & set(self.precisions):
                continue
            what = f"of this checkpoint only {', '.join(own)}" if own else "it reads no GGUF files"
            reasons[Way(name, self.precisions[0], self.batches[0], PLAIN)] = what
        return reasons

    def _possible(self, peer: Peer, method: str) -> bool:
        return not needs_draft(method) or self.draft is not None

    def groups(self, batch: int) -> list[list[list[int]]]:
        """The prompts in full batches, the first `batch_count` of them; what is left over is not used."""
        starts = range(0, len(self.prompts) - batch + 1, batch)[: self.batch_count]
        return [self.prompts[start : start + batch] for start in starts]

    def settings(self, model: Path, draft: Path | None, precision: str) -> Settings:
        context, alone = max(map(len, self.prompts)) + self.max_tokens, max(self.lengths, default=0) + 1
        return Settings(
            str(model),
            precision,
            self.threads,
            context=_padded(context),
            longest=_padded(max(context, alone)),
            batch=max(self.batches),
            draft=None if draft is None else str(draft),
        )


def _padded(tokens: int) -> int:
    return -(-(tokens + ROOM) // 64) * 64


def measure(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Everything that `results` lacks of the plan. They are saved after each visit.

    Raises:
        UserError: transformers cannot give the reference.
    """
    with ExitStack() as running:
        settings, log = plan.settings(plan.checkpoint, None, "float32"), plan.logs / "reference.log"
        reference = Reference(settings, log, plan.timeout, say, running)
        # What an environment lacks is known before anything is measured.
        broken = _install(plan, results, say)
        if not results.reference:
            results.reference, results.gaps = reference.answers(plan.prompts, plan.max_tokens)
            results.save()
        for precision in plan.precisions:
            with ExitStack() as stack:
                _Precision(plan, results, say, precision, broken, reference, stack).measure()


def _install(plan: Plan, results: Results, say: Callable[[str], None]) -> dict[str, str]:
    """Make the environments of those that take part; the peers that have none, and why."""
    results.unavailable |= (idle := plan.idle())
    broken = {}
    for name in plan.peers:
        if name in {way.peer for way in idle}:
            continue
        try:
            install(PEERS[name], say)
        except Unavailable as error:
            broken[name] = str(error)
            say(f"{name}: {error} (once it is mended, the same command goes on)")
        results.versions[name] = version(PEERS[name])
    return broken


def _turned(items: Sequence[Item], number: int) -> list[Item]:
    """Another one begins each round: whoever comes behind a noisy neighbour should not always be the same."""
    turn = number % max(len(items), 1)
    return [*items[turn:], *items[:turn]]


class _Precision:
    """All batch sizes and rounds of one precision."""

    def __init__(
        self,
        plan: Plan,
        results: Results,
        say: Callable[[str], None],
        precision: str,
        broken: dict[str, str],
        reference: Reference,
        stack: ExitStack,
    ) -> None:
        self.plan, self.results, self.say, self.precision, self.stack = plan, results, say, precision, stack
        self.broken, self.reference = broken, reference
        self.processes: dict[tuple[str, str], Process | str] = {}
        self.warm: set[Way | Reading] = set()

    def measure(self) -> None:
        planned = {batch: self.plan.ways(self.precision, batch) for batch in self.plan.batches}
        peers = list(dict.fromkeys(way.peer for way in chain.from_iterable(planned.values())))
        for way in list(self.results.unavailable):
            # What failed in an earlier run may work by now.
            if way.precision == self.precision and way.peer in peers:
                del self.results.unavailable[way]
        if self.plan.predictions:
            for peer in peers:
                if (peer, self.precision) not in self.results.divergences:
                    self._compare(peer)
        for length in self.plan.lengths:
            for number in range(self.plan.rounds):
                for reading in _turned([Reading(peer, self.precision, length) for peer in peers], number):
                    if reading.way not in self.results.unavailable and number not in self.results.seconds(reading):
                        self._read(reading, number)
        for ways in planned.values():
            for number in range(self.plan.rounds):
                for way in _turned(ways, number):
                    if way not in self.results.unavailable and not self.results.done(way, number):
                        self._visit(way, number)

    def _compare(self, peer: str) -> None:
        """A peer's predictions with the reference's."""
        way = Way(peer, self.precision, 1, "predictions")
        found = Divergence()

        def compare(process: Process) -> None:
            process.begin(None)
            for prompt in beginnings(self.plan.prompts, self.plan.predictions):
                theirs = process.logits(prompt)
                if theirs is None:
                    return
                found.add(self.reference.logits(prompt), theirs)
            self.results.divergences[peer, self.precision] = found.document()

        self._attempt(way, f"predictions: {peer}", compare)

    def _read(self, reading: Reading, number: int) -> None:
        """The first token behind prompts of one length."""
        length, times = reading.length, max(1, SHORT // reading.length)

        def read(process: Process) -> None:
            process.begin(None)
            warming = min(self.plan.lengths) if reading in self.warm else length
            process.run([of_length(self.plan.prompts, warming, number)[::-1]], 1, None)
            self.warm.add(reading)
            prompts = [of_length(self.plan.prompts, length, number * times + turn) for turn in range(times)]
            seconds = sum(process.run([prompt], 1, None).seconds for prompt in prompts) / times
            self.results.seconds(reading)[number] = seconds

        self._attempt(reading.way, f"prompt of {length}, round {number + 1}: {reading.peer}", read)

    def _visit(self, way: Way, number: int) -> None:
        """One way, once over all prompts."""

        def visit(process: Process) -> None:
            self.results.add(way, self._time(process, way, number))

        self._attempt(way, f"batch {way.batch}, round {number + 1}: {way.peer} {way.method}", visit)

    def _attempt(self, way: Way, what: str, task: Callable[[Process], None]) -> None:
        """Have a peer do something; what fails is noted and not tried again."""
        self.say(f"{self.precision}, {what}")
        try:
            process = self._process(way)
            if way in self.results.unavailable:
                return
            with process.awake():
                task(process)
        except Unavailable as error:
            self.results.unavailable[way] = str(error)
            self._forget_ended()
        self.results.save()

    def _forget_ended(self) -> None:
        """A process that broke on one way is loaded again for the next."""
        for key, process in list(self.processes.items()):
            if isinstance(process, Process) and process.ended:
                del self.processes[key]

    def _time(self, process: Process, way: Way, number: int) -> Visit:
        """The prompts in batches, behind a batch that does not count: the first of all in full, later ones a little."""
        speculation = None if way.method == PLAIN else way.method
        groups, length = self.plan.groups(way.batch), self.plan.max_tokens
        process.begin(speculation)
        backwards = [prompt[::-1] for prompt in groups[0]]
        process.run(backwards, min(length, 8) if way in self.warm else length, speculation)
        self.warm.add(way)
        answers = [process.run(group, length, speculation) for group in groups]
        seconds = [answer.seconds for answer in answers]
        prefills = [answer.prefill_seconds for answer in answers if answer.prefill_seconds is not None]
        outside = [answer.overhead * answer.seconds for answer in answers if answer.overhead is not None]
        tokens = [tokens for answer in answers for tokens in answer.tokens]
        prefix, same = agreement(tokens, self.results.reference[: len(tokens)])
        return Visit(
            number,
            len(tokens),
            sum(map(len, tokens)),
            sum(seconds),
            sum(prefills) if prefills else None,
            sum(outside) / sum(seconds) if outside else None,
            prefix,
            same,
            widest_gap(tokens, self.results.reference, self.results.gaps),
        )

    def _process(self, way: Way) -> Process:
        """The peer's process of this precision, loaded when it is first needed.

        Raises:
            Unavailable: it has no environment, its converter fails, it does not load.
        """
        peer = PEERS[way.peer]
        key = (peer.name, way.method if peer.apart and way.method in peer.methods else PLAIN)
        if key not in self.processes:
            try:
                self.processes[key] = self._load(peer)
            except Unavailable as error:
                self.processes[key] = str(error)
        process = self.processes[key]
        if isinstance(process, str):
            raise Unavailable(process)
        return process

    def _load(self, peer: Peer) -> Process:
        if peer.name in self.broken:
            raise Unavailable(self.broken[peer.name])
        log = self.plan.logs / f"{peer.name}-{self.precision}.log"
        model = converted(peer, self.plan.checkpoint, self.precision, log, self.plan.timeout, self.say)
        draft = self._draft(peer, log)
        self.say(f"{peer.name}: loading {self.precision}")
        process = Process(peer, self.plan.settings(model, draft, self.precision), log, self.plan.timeout)
        self.stack.callback(process.close)
        return process

    def _draft(self, peer: Peer, log: Path) -> Path | None:
        """The smaller model as the peer reads it; where that fails, the peer goes without."""
        drafting = [method for method in peer.methods if needs_draft(method)]
        if self.plan.draft is None or not drafting:
            return None
        try:
            return converted(peer, self.plan.draft, self.precision, log, self.plan.timeout, self.say)
        except Unavailable as error:
            for batch in self.plan.batches:
                for method in drafting:
                    self.results.unavailable[Way(peer.name, self.precision, batch, method)] = str(error)
            return None
