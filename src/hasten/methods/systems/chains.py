"""The tree of a request in Mirror-SD: its window, what may end that, and the chains behind each of these ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from hasten.engine import ROOT, Draft, Request
from hasten.methods.drafters.drawing import Matching
from hasten.methods.drafters.small_model import Growth, SmallModelDrafter

EVERYTHING = 1 << 30
"""More nodes, and levels, than a tree has."""

Source = Literal["hit", "miss", "cold"]
"""How a window came: as a candidate's chain; by starting anew where none of them was right; or as the first one."""


class Window(NamedTuple):
    """A chain to be verified, and the probability that the target agrees so far, per token."""

    tokens: list[int]
    estimates: list[float]
    source: Source


class Tree(Growth):
    """A request's window, and what may come behind it.

    Args:
        drafter, request: see `Growth`.
        length: of each chain, at most.
        confidence: a chain ends when all of it together has less probability.
        source: how the window came.

    Attributes:
        branches: candidates by how many of the window's tokens are accepted before them, and what they say.
        chains: nodes that the small model adds, by what they start behind: ROOT (the window) or a candidate.
        guesses: nodes below each chain that streams take for the next ones.
        asked: of each chain that goes on, the row of the frontier that was grown whose streams are behind it.
    """

    def __init__(
        self, drafter: SmallModelDrafter, request: Request, length: int, confidence: float, source: Source
    ) -> None:
        super().__init__(drafter, request, EVERYTHING, EVERYTHING)
        self._most, self._confidence, self.source = length, confidence, source
        self.branches: dict[tuple[int, int], int] = {}
        self.chains: dict[int, list[int]] = {ROOT: []}
        self.guesses: dict[int, list[int]] = {ROOT: []}
        self.asked: list[int] = []
        self._start: dict[int, int] = {ROOT: ROOT}
        self._chances: dict[int, float] = {}

    @property
    def window(self) -> list[int]:
        """Its nodes."""
        return self.chains[ROOT]

    @property
    def unfed(self) -> list[int]:
        """Nodes of the window that the small model has not read."""
        return [node for node in self.window if self.row(node) is None]

    def shown(self) -> Window:
        """The window as the target gets it."""
        draft = self.draft
        tokens = [draft.tokens[node] for node in self.window]
        return Window(tokens, [draft.estimates[node] for node in self.window], self.source)

    def grow(self, logits: Tensor) -> None:
        """A token more for each chain whose last node is read now, and for each guess that was right.

        Other nodes are read for those behind them.
        """
        said = dict(zip(self.frontier, self.children(logits, 1), strict=True))
        rows = {node: row for row, node in enumerate(self.frontier)}
        starts = dict.fromkeys(self._start[node] for node in self.frontier)
        self.frontier, self.asked = [], []
        for start in starts:
            node = self._tip(start)
            while node in said and (drawn := next(said[node], None)) is not None:
                row, node = rows[node], self._append(start, *drawn)
                if not self._goes_on(node):
                    break
                if node not in said:
                    self.frontier.append(node)
                    self.asked.append(row)

    def foresee(self, logits: Tensor) -> None:
        """Guess what comes behind each chain that goes on, to be read with it.

        Args:
            logits: of the streams behind it, float32 [chains, streams, small vocabulary].
        """
        fed, rows, level = self.frontier, list(range(len(self.frontier))), 0
        while self.frontier and level < logits.shape[1]:
            further: dict[int, int] = {}
            for row, node, children in zip(rows, self.frontier, self.children(logits[rows, level], 1), strict=True):
                guess = self._guess(node, *drawn) if (drawn := next(children, None)) is not None else None
                if guess is not None:
                    further[guess] = row
            self.frontier, rows, level = list(further), list(further.values()), level + 1
            fed = [*fed, *further]
        self.frontier = fed

    def consider(self, accepted: int, tokens: Sequence[int]) -> None:
        """Grow chains behind candidates, which follow so many accepted tokens of the window."""
        parent = self.window[accepted - 1] if accepted else ROOT
        for token in tokens:
            node = self.add(parent, token, 1.0)
            self.values[node] = 1.0
            self.branches[accepted, token] = node
            self.chains[node], self.guesses[node], self._start[node] = [], [], node
            if self._goes_on(node):
                self.frontier.append(node)

    def follow(self, came: Sequence[int]) -> tuple[int | None, list[int]]:
        """What the tree has behind tokens that came, and the rows of the small model's latest passes that are theirs.

        Returns:
            The start of a chain, None where there is none; numbers of pending rows.
        """
        if not came:
            return ROOT, []
        accepted = self.window[: len(came) - 1]
        if [self.draft.tokens[node] for node in accepted] != list(came[:-1]):
            return None, []
        start = self.branches.get((len(accepted), came[-1]))
        nodes = accepted if start is None else [*accepted, start]
        return start, [row for row in map(self.row, nodes) if row is not None]

    def adopt(self, other: Tree, start: int) -> None:
        """Take another tree's chain as the window, as far as it has grown."""
        above = start
        for node in other.chains[start]:
            token = other.draft.tokens[node]
            case = other.matching.cases.get((above, token))
            if case is not None:
                self.matching.cases[self._tip(ROOT), token] = case
            self._append(ROOT, token, other._chances[node])
            above = node
        # Where it may go on, all of it has to be read again: rows behind other tokens are gone.
        if self.window:
            self.frontier = self.window.copy() if self._goes_on(self.window[-1]) else []
            for node in other.guesses[start] if self.frontier else ():
                guess = self._guess(self.frontier[-1], other.draft.tokens[node], other._chances[node])
                if guess is not None:
                    self.frontier.append(guess)

    def judged(self) -> tuple[Matching, Draft]:
        """The window by itself, and what the request's belief is to learn of it."""
        draft, matching = self.draft.subset(self.window), Matching(self.request, self.matching.belief)
        for above, node in zip([ROOT, *range(len(draft))], self.window, strict=False):
            token = self.draft.tokens[node]
            case = self.matching.cases.get((self.draft.parents[node], token))
            if case is not None:
                matching.cases[above, token] = case
        return matching, draft

    def _append(self, start: int, token: int, chance: float) -> int:
        """Another token of a chain, which may have been guessed."""
        above, guesses = self._tip(start), self.guesses[start]
        if guesses and self.draft.tokens[guesses[0]] == token:
            node = guesses.pop(0)
            self.values[node] = self.draft.estimates[node] = self.values[above] * chance
        else:
            guesses.clear()
            node = self._add(start, above, token, chance)
        self.chains[start].append(node)
        self._chances[node] = chance
        return node

    def _guess(self, above: int, token: int, chance: float) -> int | None:
        """What a stream takes for the token behind a node, if it is of use to read that."""
        start = self._start[above]
        node = self._add(start, above, token, chance)
        if not self._goes_on(node):
            return None
        self.guesses[start].append(node)
        return node

    def _add(self, start: int, above: int, token: int, chance: float) -> int:
        node = self.add(above, token, chance)
        self._start[node], self._chances[node] = start, chance
        return node

    def _tip(self, start: int) -> int:
        return self.chains[start][-1] if self.chains[start] else start

    def _goes_on(self, node: int) -> bool:
        """Whether something is drafted behind a node: not behind the end of a text, nor beyond any limit."""
        start, depth = self._start[node], len(self.paths[node])
        short = depth - len(self.paths[start]) < self._most and depth < self.depth
        return short and self.draft.tokens[node] not in self.closed and self.values[node] >= self._confidence
