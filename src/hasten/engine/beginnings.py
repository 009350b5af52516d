"""What prompts begin with is read once: it was kept of an earlier text, or one request reads it and the others wait."""

from __future__ import annotations

import numpy as np

from hasten.cache import Cache, Prefixes, SequenceCache
from hasten.cache.radix import Node, RadixTree
from hasten.engine.context import EVERYTHING
from hasten.engine.drafting.approximation import Approximation
from hasten.engine.drafting.speculation import Speculation
from hasten.engine.job import Job
from hasten.engine.scheduler import Scheduler

LEAST = 64
"""Tokens that a request must be spared to wait for another one."""


class Beginnings:
    """Lets requests begin behind rows that the cache has, or will have soon.

    A request that waits holds nothing and waits for an older one only, so it keeps nobody from going on.

    Args:
        cache: that all slots are in.
        prefixes: finished texts; without room for them nothing is shared.
        scheduler: whose requests wait for each other.
    """

    def __init__(self, cache: Cache, prefixes: Prefixes, scheduler: Scheduler) -> None:
        self._cache, self._prefixes, self._scheduler = cache, prefixes, scheduler
        # Requests that are not over, by tenant and by their prompts.
        self._trees: dict[str, RadixTree[Job]] = {}
        self._nodes: dict[Job, Node[Job]] = {}

    def find(self, request: Job) -> None:
        """Begin a request behind what its prompt has in common with a text, or with what another one reads.

        Nothing happens to one that has read something, or waits for another choice of its prompt.
        """
        request.forerunner = None
        if not self._keeps(request) or request.read or request.leader is not None:
            return
        if not request.drafter.reads_whole and request.params.prompt_logprobs is None:
            known = self._prefixes.fork(request.params.tenant, request.tokens[: request.prompt_length])
            found = self._forerunner(request, known.length if known else 0)
            if found is not None:
                if known is not None:
                    known.release()
                request.forerunner, request.common = found
                self._follow(request)
            elif known is not None:
                self._begin(request, known)
        self.enter(request)

    def enter(self, request: Job) -> None:
        """Others may begin behind a request's prompt, if the cache will have that and can go back to parts of it."""
        if request in self._nodes or not self._keeps(request):
            return
        if not self._cache.state_bytes and not request.drafter.rations:
            tree = self._trees.setdefault(request.params.tenant, RadixTree())
            prompt = np.asarray(request.tokens[: request.prompt_length], dtype=np.int64)
            self._nodes[request] = tree.add(prompt, request)

    def hand_on(self, forerunner: Job) -> None:
        """Those that wait for what a request has read begin behind it."""
        for request in self._scheduler.successors(forerunner):
            self._follow(request)

    def give_back(self, request: Job) -> None:
        """Release a request's slots, or keep them for prompts that begin as its text; who waits for more looks anew."""
        self._leave(request)
        if self._keeps(request):
            # The last draft may have been accepted beyond where the text was ended; what an approximation keeps of its
            # own rows is not what the model would.
            own = request.prompt_length if isinstance(request.drafter, Approximation) else len(request.tokens)
            request.sequence.crop(min(request.read, own))
            self._prefixes.keep(request.params.tenant, request.tokens[: min(request.read, own)], request.sequence)
        else:
            request.sequence.release()
        stranded = self._scheduler.successors(request)
        for each in stranded:
            each.forerunner = None
            self._leave(each)
        # The oldest goes on with what was kept, and the others wait for that one.
        for each in sorted(stranded, key=lambda each: each.id):
            self.find(each)

    def _leave(self, request: Job) -> None:
        node, tenant = self._nodes.pop(request, None), request.params.tenant
        if node is not None:
            self._trees[tenant].remove(node, request)
            if not self._trees[tenant]:
                del self._trees[tenant]

    def _keeps(self, request: Job) -> bool:
        """Whether what the cache has of a request is its text: what was left out, or never was a token, is none."""
        whole = request.context is EVERYTHING and not request.spans
        return self._prefixes.limit_bytes > 0 and whole and isinstance(request.decoding, Speculation)

    def _forerunner(self, request: Job, known: int) -> tuple[Job, int] | None:
        """Who has read more of the first tokens than are known, or will have before; and how many.

        The last token is left to be read. Of several that wait for each other, it is the first that spares about as
        much: prompts that all differ by another word would else be read one after the other.
        """
        tree = self._trees.get(request.params.tenant)
        if tree is None or request.drafter.rations:
            return None
        wanted = np.asarray(request.tokens[: request.prompt_length - 1], dtype=np.int64)
        for other, common in tree.nearest(wanted):
            if common < known + LEAST:
                return None
            # Nobody waits for one that came later, and may wait itself.
            if other.id < request.id or other.read >= common:
                while other.forerunner is not None and other.common >= max(common - LEAST, known + LEAST):
                    other, common = other.forerunner, min(common, other.common)
                return other, common
        return None

    def _follow(self, request: Job) -> None:
        forerunner = request.forerunner
        if forerunner is not None and forerunner.read >= request.common:
            sequence = forerunner.sequence.fork()
            sequence.crop(request.common)
            self._begin(request, sequence)

    @staticmethod
    def _begin(request: Job, sequence: SequenceCache) -> None:
        request.sequence, request.forerunner = sequence, None
        request.read = request.statistics.recalled_rows = sequence.length
        request.shown = max(request.shown, request.read)
