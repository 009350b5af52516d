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

LEAST = 0.5
"""A guess is read where it and those above it have so much probability together: its rows cost something, too."""

GUESSED = 3
"""Tokens behind a row: what it says itself, what its streams guess, and what is said behind a guess."""

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
        behind: by rows of the frontier that was grown, the last node of each chain that goes on behind one.
    """

    def __init__(
        self, drafter: SmallModelDrafter, request: Request, length: int, confidence: float, source: Source
    ) -> None:
        super().__init__(drafter, request, EVERYTHING, EVERYTHING)
        self._most, self._confidence, self.source = length, confidence, source
        self.branches: dict[tuple[int, int], int] = {}
        self.chains: dict[int, list[int]] = {ROOT: []}
        self.guesses: dict[int, list[int]] = {ROOT: []}
        self.behind: dict[int, int] = {}
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

    @property
    def asked(self) -> list[int]:
        """Rows of the frontier whose streams are of use: a guess is, where a token more has room behind it."""
        starts = [self._start[node] for node in self.frontier]
        return [
            row
            for row, (node, start) in enumerate(zip(self.frontier, starts, strict=True))
            if self._room(node) >= GUESSED and (node == self._tip(start) or node in self.guesses[start])
        ]

    def grow(self, logits: Tensor) -> None:
        """A token more for each chain whose last node is read now, and for each guess that was right.

        Other nodes are read for those behind them.
        """
        said = dict(zip(self.frontier, self.children(logits, 1), strict=True))
        rows = {node: row for row, node in enumerate(self.frontier)}
        starts = dict.fromkeys(self._start[node] for node in self.frontier)
        self.frontier, self.behind = [], {}
        for start in starts:
            node = self._tip(start)
            while node in said and (drawn := next(said[node], None)) is not None:
                row, node = rows[node], self._append(start, *drawn)
                if not self._goes_on(node):
                    break
                if node not in said:
                    self.frontier.append(node)
                    self.behind[row] = node

    def foresee(self, rows: Sequence[int], logits: Tensor) -> None:
        """Guess what comes behind chains that go on, to be read with it.

        Args:
            rows: of the frontier before, that have such a chain behind them.
            logits: of the streams of each, float32 [rows, streams, small vocabulary].
        """
        fed, places = self.frontier, list(range(len(rows)))
        self.frontier, sure = [self.behind[row] for row in rows], [1.0] * len(rows)
        for level in range(logits.shape[1]):
            if not self.frontier:
                break
            guessed: dict[int, int] = {}
            for place, node, children in zip(
                places, self.frontier, self.children(logits[places, level], 1), strict=True
            ):
                token, chance = next(children, (0, 0.0))
                sure[place] *= chance
                if sure[place] >= LEAST and (guess := self._guess(node, token, chance)) is not None:
                    guessed[guess] = place
            self.frontier, places = list(guessed), list(guessed.values())
            fed = [*fed, *guessed]
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
        ends = self._room(node) < 1 or self.draft.tokens[node] in self.closed
        return not ends and self.values[node] >= self._confidence

    def _room(self, node: int) -> int:
        """Tokens of its chain that there may be behind a node."""
        depth, above = len(self.paths[node]), len(self.paths[self._start[node]])
        return min(self._most - (depth - above), self.depth - depth)
