"""CopySpec: when the last few tokens occurred before, the block that followed them then is proposed as a copy.

"CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality", 2025, arXiv 2502.08923.
No model and no training: a table from every run of `gamma` tokens of the context (prompt, earlier turns, own output) to
the positions behind it. Lookup and update cost the same however long the context is, and the longer it is, the more
there is to copy. Where nothing repeats, nothing is proposed; `copyspec+draft-model` asks a draft model then, as the
paper does. Exactness: lossless, greedy and sampling (a deterministic chain).

The table is keyed by the tokens themselves, where the paper keys it by a rolling hash of them: no collisions, and as
fast for keys this short. Beyond the paper, each a parameter or free of charge:

- *Which occurrence.* The authors take the first; a short key alone is often a coincidence. `longest` takes the
  occurrence whose left context agrees furthest with the present one, the latest of equals.
- *Not twice.* A position whose copy was wrong from its first token is not proposed again for `BAN` tokens (with `retry`
  it is). There can be no more such positions than tokens, so this bounds what a lookup passes over, too.
- *Longer copies.* With `limit` above `length` a block that came out right in full is followed by one twice as long.
- A block ends behind the first special token (end of text, a role marker): what follows belongs to another text.
- Where the context ends inside a block, the copy goes on through itself, so that loops are copied whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from hasten.engine import Draft, Drafter, Request, Target, register
from hasten.engine.memory import table_growth
from hasten.errors import UserError

OCCURRENCES = ("first", "last", "longest")
CANDIDATES = 32
"""Occurrences that `longest` compares, the latest ones: what keeps a lookup's cost bounded."""
CONTEXT = 32
"""Tokens of left context that are compared, at most."""
BAN = 128
"""Tokens for which a position is not proposed again."""
PRIOR = 4.0
"""How many copies the expectation of a fresh request is worth."""


@dataclass(frozen=True)
class CopySpecParameters:
    """Parameters, with the authors' defaults but for `occurrence`, which is the one that measured best.

    Attributes:
        gamma: tokens that must have occurred before.
        length: tokens copied.
        limit: of the length, which doubles while blocks come out right in full; 0 never lets it grow.
        occurrence: `first`, `last`, or `longest` (whose left context agrees furthest).
        retry: propose a position again at once whose copy was wrong from its first token, as the authors do.

    Raises:
        UserError: out of range.
    """

    gamma: int = 3
    length: int = 10
    limit: int = 0
    occurrence: str = "longest"
    retry: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.gamma <= 16:
            raise UserError("copyspec: gamma must be between 1 and 16")
        if not 1 <= self.length <= 64:
            raise UserError("copyspec: length must be between 1 and 64")
        if self.limit and not self.length <= self.limit <= 128:
            raise UserError("copyspec: limit must be 0 or between length and 128")
        if self.occurrence not in OCCURRENCES:
            raise UserError(f"copyspec: occurrence must be one of {', '.join(OCCURRENCES)}, not {self.occurrence!r}")


@dataclass
class _Copy:
    """A block proposed when the context had `start` tokens, from the position `source`."""

    source: int
    start: int
    block: list[int]


@dataclass
class _Memory:
    """What is known of one request.

    Attributes:
        table: each run of gamma tokens that something follows, to the positions of what follows, in order.
        indexed: tokens of the context that are in the table as followers.
        wrong: positions whose copy was wrong from its first token, to the context's length then; the latest at the end.
        length: of the next block.
        copy: the last proposal, until it is judged.
        begun, right: copies judged, and those of them whose first token was right.
        further, held: copied tokens behind a right one that were judged, and those of them that were right, too.
    """

    length: int
    table: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    indexed: int = 0
    wrong: dict[int, int] = field(default_factory=dict)
    copy: _Copy | None = None
    begun: int = 0
    right: int = 0
    further: int = 0
    held: int = 0


@register(
    "copyspec",
    family="drafters",
    exactness="lossless",
    paper="2502.08923",
    title="CopySpec: copy what followed the last tokens before",
    parameters=CopySpecParameters,
)
class CopySpec(Drafter):
    """One table per request, brought up to date when a draft is asked for: other drafters may take turns."""

    def __init__(self, target: Target, parameters: CopySpecParameters) -> None:
        self.parameters = parameters
        self._memories: dict[int, _Memory] = {}
        self._special = target.end_ids
        if target.tokenizer is not None:
            added = target.tokenizer.added_tokens_decoder
            self._special |= {token for token, entry in added.items() if entry.special}

    @property
    def memory_bytes(self) -> int:
        """Of the tables, estimated from their sizes."""
        entry = sys.getsizeof((0,) * self.parameters.gamma) + sys.getsizeof([0])
        return sum(
            sys.getsizeof(memory.table) + entry * len(memory.table) + 8 * memory.indexed
            for memory in self._memories.values()
        )

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        entry = sys.getsizeof((0,) * self.parameters.gamma) + sys.getsizeof([0]) + 8
        grown = 0
        for request in requests:
            memory = self._memories.get(request.id)
            tokens = len(request.tokens) - (memory.indexed if memory is not None else 0)
            grown += tokens * entry + table_growth(None if memory is None else memory.table, tokens)
        return grown

    def propose(self, request: Request, budget: int) -> Draft:
        tokens = request.tokens
        memory = self._memories.get(request.id)
        if memory is None:
            memory = self._memories[request.id] = _Memory(self.parameters.length)
        self._index(memory, tokens)
        self._judge(memory, tokens)
        source = self._source(memory, tokens)
        if source is None:
            return Draft()
        block = self._block(tokens, source, min(memory.length, budget))
        memory.copy = _Copy(source, len(tokens), block)
        return Draft.chain(block, self._estimates(memory, len(block)))

    def end(self, request: Request) -> None:
        self._memories.pop(request.id, None)

    def _index(self, memory: _Memory, tokens: list[int]) -> None:
        """Enter the runs that end before each new token; the context's own end, the next query, has no follower yet."""
        gamma, table = self.parameters.gamma, memory.table
        for position in range(max(memory.indexed, gamma), len(tokens)):
            table.setdefault(tuple(tokens[position - gamma : position]), []).append(position)
        memory.indexed = len(tokens)

    def _judge(self, memory: _Memory, tokens: list[int]) -> None:
        """Compare the last copy with what has come since, whoever's draft was verified."""
        copy, memory.copy = memory.copy, None
        came = tokens[copy.start : copy.start + len(copy.block)] if copy is not None else []
        if copy is None or not came:
            return
        agreed = _agreement(copy.block, came)
        memory.begun += 1
        if agreed == 0:
            memory.wrong.pop(copy.source, None)
            memory.wrong[copy.source] = copy.start
        else:
            memory.right += 1
            memory.further += min(agreed, len(came) - 1)
            memory.held += agreed - 1
        if agreed < len(came):
            memory.length = self.parameters.length
        elif agreed == len(copy.block):
            memory.length = max(memory.length, min(2 * memory.length, self.parameters.limit))

    def _source(self, memory: _Memory, tokens: list[int]) -> int | None:
        """The position to copy from, by the policy; None where nothing repeats."""
        gamma, policy = self.parameters.gamma, self.parameters.occurrence
        positions = memory.table.get(tuple(tokens[-gamma:]))
        if positions is None:
            return None
        ordered: Iterator[int] = iter(positions) if policy == "first" else reversed(positions)
        if not self.parameters.retry:
            while memory.wrong and len(tokens) - next(iter(memory.wrong.values())) > BAN:
                del memory.wrong[next(iter(memory.wrong))]
            ordered = (position for position in ordered if position not in memory.wrong)
        if policy != "longest":
            return next(ordered, None)
        best, longest = None, -1
        for position in islice(ordered, CANDIDATES):
            agreed = _left_agreement(tokens, position - gamma, len(tokens) - gamma)
            if agreed > longest:
                best, longest = position, agreed
            if longest == CONTEXT:
                break
        return best

    def _block(self, tokens: list[int], source: int, length: int) -> list[int]:
        """At most `length` tokens from `source` on, through the copy itself where the context ends."""
        period = len(tokens) - source
        block = []
        for step in range(length):
            block.append(tokens[source + step % period])
            if block[-1] in self._special:
                break
        return block

    @staticmethod
    def _estimates(memory: _Memory, length: int) -> list[float]:
        """Of a chain whose first token is right at one rate, and each further one at another, by this request's record.

        The expectation before there is a record: three of four, then nine of ten.
        """
        likely = (PRIOR * 0.75 + memory.right) / (PRIOR + memory.begun)
        rate = (PRIOR * 0.9 + memory.held) / (PRIOR + memory.further)
        return [likely * rate**step for step in range(length)]


def _agreement(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _left_agreement(tokens: list[int], one: int, other: int) -> int:
    """How many tokens before position `one` equal those before the later position `other`; `CONTEXT` at most."""
    count, most = 0, min(one, CONTEXT)
    while count < most and tokens[one - 1 - count] == tokens[other - 1 - count]:
        count += 1
    return count
