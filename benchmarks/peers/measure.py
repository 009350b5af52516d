"""The comparison: load the peers of a precision, visit them in turns, round by round."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from catalogue import PEERS, Peer, needs_draft
from environments import Unavailable, converted, install, version
from process import Process
from results import PLAIN, Results, Visit, Way, agreement
from workers.protocol import Settings

from hasten.errors import UserError

ROOM = 16
"""Tokens of context beyond what is needed: drafts reach further than answers."""


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        checkpoint, draft: Hugging Face folders.
        prompts: token ids.
        batch_count: batches of one size that a visit decodes at most; None takes as many as the prompts fill.
        timeout: seconds that a peer may take to convert, to load and for each batch.
        logs: folder for what workers print.
    """

    checkpoint: Path
    draft: Path | None
    prompts: list[list[int]]
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
        return [way for way in ways if precision in PEERS[way.peer].precisions]

    def _possible(self, peer: Peer, method: str) -> bool:
        return not needs_draft(method) or self.draft is not None

    def groups(self, batch: int) -> list[list[list[int]]]:
        """The prompts in full batches, the first `batch_count` of them; what is left over is not used."""
        starts = range(0, len(self.prompts) - batch + 1, batch)[: self.batch_count]
        return [self.prompts[start : start + batch] for start in starts]

    def settings(self, model: Path, draft: Path | None, precision: str) -> Settings:
        longest = max(map(len, self.prompts)) + self.max_tokens + ROOM
        return Settings(
            str(model),
            precision,
            self.threads,
            context=-(-longest // 64) * 64,
            batch=max(self.batches),
            draft=None if draft is None else str(draft),
        )


def measure(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Everything that `results` lacks of the plan. They are saved after each visit.

    Raises:
        UserError: transformers cannot give the reference.
    """
    if not results.reference:
        results.reference = _reference(plan, say)
        results.save()
    broken = _install(plan, results, say)
    for precision in plan.precisions:
        with ExitStack() as stack:
            _Precision(plan, results, say, precision, broken, stack).measure()


def _reference(plan: Plan, say: Callable[[str], None]) -> list[list[int]]:
    """Greedy answers in float32 by transformers, prompt by prompt, in the interpreter that runs this."""
    say("reference: transformers, float32")
    settings, log = plan.settings(plan.checkpoint, None, "float32"), plan.logs / "reference.log"
    try:
        process = Process(PEERS["transformers"], settings, log, plan.timeout, Path(sys.executable))
        with closing(process), process.awake():
            return [process.run([prompt], plan.max_tokens, None).tokens[0] for prompt in plan.prompts]
    except Unavailable as error:
        raise UserError(f"transformers gives no reference: {error} ({log})") from error


def _install(plan: Plan, results: Results, say: Callable[[str], None]) -> dict[str, str]:
    """Make the environments; the peers that have none, and why."""
    broken = {}
    for name in plan.peers:
        try:
            install(PEERS[name], say)
        except Unavailable as error:
            broken[name] = str(error)
        results.versions[name] = version(PEERS[name])
    return broken


class _Precision:
    """All batch sizes and rounds of one precision."""

    def __init__(
        self,
        plan: Plan,
        results: Results,
        say: Callable[[str], None],
        precision: str,
        broken: dict[str, str],
        stack: ExitStack,
    ) -> None:
        self.plan, self.results, self.say, self.precision, self.stack = plan, results, say, precision, stack
        self.broken = broken
        self.processes: dict[tuple[str, str], Process | str] = {}
        self.warm: set[Way] = set()

    def measure(self) -> None:
        planned = {batch: self.plan.ways(self.precision, batch) for batch in self.plan.batches}
        for way in chain.from_iterable(planned.values()):
            # What failed in an earlier run may work by now.
            self.results.unavailable.pop(way, None)
        for ways in planned.values():
            for number in range(self.plan.rounds):
                # Another one begins each round: whoever comes behind a noisy neighbour should not always be the same.
                turn = number % max(len(ways), 1)
                for way in [*ways[turn:], *ways[:turn]]:
                    if way not in self.results.unavailable and not self.results.done(way, number):
                        self._visit(way, number)

    def _visit(self, way: Way, number: int) -> None:
        """One way, once over all prompts; what fails is noted and not tried again."""
        self.say(f"{self.precision}, batch {way.batch}, round {number + 1}: {way.peer} {way.method}")
        try:
            process = self._process(way)
            if way in self.results.unavailable:
                return
            with process.awake():
                self.results.add(way, self._time(process, way, number))
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
        )

    def _process(self, way: Way) -> Process:
        """The peer's process of this precision, loaded when it is first needed.

        Raises:
            Unavailable: it has no environment, its converter fails, it does not load.
        """
        peer = PEERS[way.peer]
        key = (peer.name, way.method if peer.apart else PLAIN)
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
