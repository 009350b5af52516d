"""Counts of every token string of up to `depth` tokens in a changing set of token sequences.

The index is a suffix automaton (Blumer et al. 1985) over all sequences together. A state stands for the strings that
end at exactly the same places: they are suffixes of one another, with lengths from `length[link] + 1` to `length`, and
share one count. So a state holds all match lengths that would give the same draft, and its link leads to the next
shorter ones. Appending a token costs a few microseconds whatever came before, and a lookup depends on the match, not on
how often it occurs.

Sequences may grow in turns. One is removed by walking through it once more and counting down; a state whose strings
are gone is taken out and used again.

Against a path-compressed suffix tree with one active node per live suffix: the same counts, without `depth` moves per
token.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hasten.engine.memory import table_growth

ROOT, NOWHERE = 0, -1
BYTES_PER_STATE = 400
"""Six numbers and, where several tokens follow, a dictionary of a few."""
MANY = -1
"""In place of a state's only token: it has none, or several in `_branches`."""


@dataclass
class _Growing:
    """One sequence: its tokens, the state of all of them, and the state of the last `depth`."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    whole: int = ROOT
    recent: int = ROOT


class SuffixIndex:
    """An automaton in flat arrays; a state is a number.

    Args:
        depth: strings of up to so many tokens are counted.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._sequences: dict[int, _Growing] = {}
        self._next_sequence = 0
        self._clear()

    def _clear(self) -> None:
        """Only the root, which stands for the empty string."""
        self._length = array("i", [0])
        self._link = array("i", [NOWHERE])
        self._count = array("i", [0])
        # Why a state lives: prefixes of sequences that end in it, and states that link to it. The root always does.
        self._uses = array("i", [1])
        # Most states go on with one token, kept in place; a dictionary per state would take several times the memory.
        self._token = array("i", [MANY])
        self._next = array("i", [ROOT])
        self._branches: dict[int, dict[int, int]] = {}
        self._free: list[int] = []

    # Sequences

    def __len__(self) -> int:
        """Sequences held."""
        return len(self._sequences)

    @property
    def states(self) -> int:
        """States in use, besides the root."""
        return len(self._length) - 1 - len(self._free)

    @property
    def memory_bytes(self) -> int:
        """Bytes held: arrays, branches, tokens."""
        arrays = (self._length, self._link, self._count, self._uses, self._token, self._next)
        branches = sys.getsizeof(self._branches) + sum(map(sys.getsizeof, self._branches.values()))
        tokens = sum(4 * len(sequence.tokens) for sequence in self._sequences.values())
        return sum(4 * len(each) for each in arrays) + branches + tokens

    def growth_bytes(self, tokens: int) -> int:
        """What so many further tokens add at most.

        Each makes up to two states, one of them a copy with all branches, of which none has more than the root; the
        table of branches may be made anew at several times its size.
        """
        widest = sys.getsizeof(self._branches.get(ROOT, {}))
        return tokens * (2 * BYTES_PER_STATE + widest) + table_growth(self._branches, tokens)

    @classmethod
    def fresh_bytes(cls, tokens: int) -> int:
        """What an index of so many tokens holds at most: with all of them different the root is the widest table."""
        return tokens * (2 * BYTES_PER_STATE + 128) + BYTES_PER_STATE

    def add(self) -> int:
        """Begin a sequence; returns its number."""
        number = self._next_sequence
        self._next_sequence += 1
        self._sequences[number] = _Growing()
        return number

    def tokens(self, number: int) -> list[int]:
        """A sequence as it is now."""
        return self._sequences[number].tokens.tolist()

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        """Append tokens (ids from 0 up) to a sequence."""
        sequence = self._sequences[number]
        count, link, uses = self._count, self._link, self._uses
        whole, recent = sequence.whole, sequence.recent
        for token in tokens:
            whole = self._extended(whole, token)
            uses[whole] += 1
            recent = state = self._within_depth(self._step(recent, token))
            while state != ROOT:
                count[state] += 1
                state = link[state]
        sequence.whole, sequence.recent = whole, recent
        sequence.tokens.extend(tokens)

    def remove(self, number: int) -> None:
        """Forget a sequence, as if it had never been."""
        tokens = self._sequences.pop(number).tokens
        if not self._sequences:
            self._clear()
            return
        count, link, uses = self._count, self._link, self._uses
        prefixes, recent = [ROOT], ROOT
        for token in tokens:
            prefixes.append(self._step(prefixes[-1], token))
            recent = state = self._within_depth(self._step(recent, token))
            while state != ROOT:
                count[state] -= 1
                state = link[state]
        # Longest prefix first, so that nothing leads on from a state when its turn comes.
        for index in range(len(tokens) - 1, -1, -1):
            token, state = tokens[index], prefixes[index + 1]
            uses[state] -= 1
            dead = set()
            while uses[state] == 0:
                dead.add(state)
                state = link[state]
                uses[state] -= 1
            # Whatever leads to them is a suffix of the prefix before, the longer ones first.
            before = prefixes[index]
            while before != NOWHERE and self._step(before, token) in dead:
                self._unset(before, token)
                before = link[before]
            self._free += dead

    # Lookups

    def matches(self, context: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Suffixes of a context that occur, longest first: (state, longest, shortest) length with the same places."""
        length, link = self._length, self._link
        state, longest = self.longest(context)
        while state != ROOT:
            shorter = link[state]
            yield state, longest, length[shorter] + 1
            state, longest = shorter, length[shorter]

    def longest(self, context: Sequence[int]) -> tuple[int, int]:
        """The state of the longest suffix of a context that occurs, and its length."""
        only, following = self._token, self._next
        state, longest = ROOT, 0
        for token in context:
            if only[state] == token:
                state, longest = following[state], longest + 1
            else:
                state, longest = self.onward(state, longest, token)
        return state, longest

    def onward(self, state: int, longest: int, token: int) -> tuple[int, int]:
        """The state of the longest suffix of a match and one more token that occurs, and its length.

        Args:
            state, longest: of the match, and how much of the state's strings it is.
        """
        following = self._step(state, token)
        while following == ROOT and state != ROOT:
            state = self._link[state]
            longest = self._length[state]
            following = self._step(state, token)
        return (following, longest + 1) if following != ROOT else (ROOT, 0)

    def shorter(self, state: int) -> tuple[int, int]:
        """The state of the longest string that more places end with, and its length; the root's is NOWHERE."""
        link = self._link[state]
        return link, self._length[link] if link != NOWHERE else 0

    def count(self, state: int) -> int:
        """How often a state's strings occur, the very ends of sequences included."""
        return self._count[state]

    def likeliest(self, state: int) -> tuple[int, int, int] | None:
        """(count, token, state) of the most frequent next token, the one that came first among equals."""
        token = self._token[state]
        if token != MANY:
            only = self._next[state]
            return self._count[only], token, only
        row = self._branches.get(state)
        if row is None:
            return None
        counts = list(map(self._count.__getitem__, row.values()))
        most = max(counts)
        token = list(row)[counts.index(most)]
        return most, token, row[token]

    def following(self, state: int, least: int) -> list[tuple[int, int, int]]:
        """(count, token, state) of every next token of at least that count, in the order they came."""
        token, count = self._token[state], self._count
        if token != MANY:
            only = self._next[state]
            return [(count[only], token, only)] if count[only] >= least else []
        row = self._branches.get(state, {})
        return [(count[child], token, child) for token, child in row.items() if count[child] >= least]

    # The automaton

    def _step(self, state: int, token: int) -> int:
        """The state after one more token; ROOT where that string does not occur."""
        if self._token[state] == token:
            return self._next[state]
        row = self._branches.get(state)
        return row.get(token, ROOT) if row is not None else ROOT

    def _within_depth(self, state: int) -> int:
        """The state of the longest suffix that is counted."""
        length, link, depth = self._length, self._link, self.depth
        while length[link[state]] >= depth:
            state = link[state]
        return state

    def _extended(self, last: int, token: int) -> int:
        """The state of a whole sequence with one token more, made if need be; `last` is that of the sequence so far."""
        known = self._step(last, token)
        if known != ROOT:
            return self._exactly(last, token, known)
        link = self._link
        fresh = self._new(self._length[last] + 1)
        state = last
        while state != NOWHERE and self._step(state, token) == ROOT:
            self._set(state, token, fresh)
            state = link[state]
        link[fresh] = ROOT if state == NOWHERE else self._exactly(state, token, self._step(state, token))
        self._uses[link[fresh]] += 1
        return fresh

    def _exactly(self, before: int, token: int, state: int) -> int:
        """The state whose longest string is that of `before` and the token: `state`, or its shorter part split off."""
        if self._length[state] == self._length[before] + 1:
            return state
        part = self._new(self._length[before] + 1)
        self._link[part] = self._link[state]
        self._link[state] = part
        self._count[part] = self._count[state]
        self._uses[part] = 1
        self._token[part], self._next[part] = self._token[state], self._next[state]
        if state in self._branches:
            self._branches[part] = dict(self._branches[state])
        while before != NOWHERE and self._step(before, token) == state:
            self._set(before, token, part)
            before = self._link[before]
        return part

    def _new(self, length: int) -> int:
        """A state that nothing leads to or from yet."""
        if self._free:
            state = self._free.pop()
            self._length[state], self._count[state], self._uses[state] = length, 0, 0
            return state
        self._length.append(length)
        self._link.append(NOWHERE)
        self._count.append(0)
        self._uses.append(0)
        self._token.append(MANY)
        self._next.append(ROOT)
        return len(self._length) - 1

    def _set(self, state: int, token: int, following: int) -> None:
        """Let a token lead on from a state; what leads there already keeps its place in the order."""
        row = self._branches.get(state)
        if row is not None:
            row[token] = following
        elif self._token[state] in (MANY, token):
            self._token[state], self._next[state] = token, following
        else:
            self._branches[state] = {self._token[state]: self._next[state], token: following}
            self._token[state] = MANY

    def _unset(self, state: int, token: int) -> None:
        """Let a token lead nowhere any more."""
        row = self._branches.get(state)
        if row is None:
            self._token[state] = MANY
            return
        del row[token]
        if len(row) == 1:
            ((self._token[state], self._next[state]),) = row.items()
            del self._branches[state]
