"""Constrained output: which tokens a JSON schema, a regular expression or a grammar allows next.

llguidance reads the constraint and keeps the parser. Here stands what the engine asks of it: the tokens that are
allowed behind any path of uncommitted tokens, so that every row of a draft has its own mask, and a draft can be judged
before it is verified. A path is walked once: its mask is kept until the path is committed or given up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.engine.drafting.draft import ROOT, Draft
from hasten.engine.sampling.gbnf import decoded
from hasten.engine.sampling.schema import refuse_repetition
from hasten.engine.sampling.text_tokenizer import text_tokenizer
from hasten.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Bits = NDArray[np.uint8]
"""A set of token ids, one bit each, lowest bit first."""

KEPT_COMPILED = 64
"""Compiled constraints that an engine remembers."""
WHITESPACE = r"\n?[ \t]{0,32}"
"""Between the tokens of JSON: a line break and an indentation. Without a bound, a weak model may write it forever."""


@dataclass(frozen=True)
class Constraint:
    """What the output must be: exactly one of the fields is given.

    Attributes:
        json_schema: a JSON schema, as text or as Python objects. Properties come in the schema's order.
        regex: the whole output matches it (Rust syntax: no look-around, no back-references).
        grammar: a context-free grammar, in Lark syntax (`start: ...`) or GBNF (`root ::= ...`).
        json_object: any JSON object.

    Raises:
        UserError: none of them, several, or a schema that is no JSON object. What the constraint means is checked when
            a request is made with it.
    """

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = (self.json_schema is not None, self.regex is not None, self.grammar is not None, self.json_object)
        if sum(given) != 1:
            raise UserError("a constraint is exactly one of json_schema, regex, grammar and json_object")
        if self.json_schema is None:
            return
        try:
            text = self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)
            schema = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the JSON schema is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise UserError("the JSON schema must be an object")
        # As text it can be a key.
        object.__setattr__(self, "json_schema", text)

    @property
    def kind(self) -> str:
        """For messages."""
        return "regex" if self.regex is not None else "grammar" if self.grammar is not None else "JSON schema"


class Grammars:
    """Compiles constraints for one model, and remembers the last used ones. Any thread may come.

    Args:
        tokenizer: of transformers, backed by the tokenizers library.
        vocabulary: size of the logits.
        end_ids: end-of-text ids of the model.

    Raises:
        UserError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: Collection[int]) -> None:
        if tokenizer is None:
            raise UserError("a constraint needs a tokenizer, and this model has none")
        size = max(vocabulary, len(tokenizer))
        ends = sorted(end for end in end_ids if 0 <= end < vocabulary)
        known = [end for end in ends if end < len(tokenizer)]
        if not known and tokenizer.eos_token_id is None:
            raise UserError("constrained output cannot use this tokenizer: it has no end-of-text token")
        try:
            self._tokenizer = text_tokenizer(getattr(tokenizer, "complete", tokenizer), size, known)
        except ImportError as error:
            raise UserError("constrained output needs llguidance: pip install 'hasten[grammar]'") from error
        except Exception as error:  # the Rust side raises whatever it meets
            raise UserError(f"constrained output cannot use this tokenizer: {_sentence(str(error))}") from error
        self.vocabulary = vocabulary
        self.ends = frozenset(ends)
        may_end = np.zeros(size, dtype=bool)
        may_end[ends] = True
        self.end_bits: Bits = np.packbits(may_end, bitorder="little")
        is_text = np.arange(size) < vocabulary
        is_text[[*ends, *self._tokenizer.eos_tokens]] = False
        self.text_bits: Bits = np.packbits(is_text, bitorder="little")
        self.every_bit: Bits = np.full_like(self.text_bits, 255)
        self._compiled: dict[Constraint, LLMatcher] = {}

    def start(self, constraint: Constraint) -> GrammarState:
        """The state of a new request.

        Raises:
            UserError: the constraint is malformed, uses what is not supported, or allows no token at all.
        """
        state = GrammarState(self, partial(self._compile, constraint), self._copy(constraint))
        first = state.bits(())
        if first is None or not first.any():
            raise UserError(f"the {constraint.kind} allows no text that this tokenizer can write")
        return state

    def _copy(self, constraint: Constraint) -> LLMatcher:
        """A matcher at the start; copies share what their parser has learned of the constraint."""
        compiled = self._compiled.pop(constraint, None)
        if compiled is None:
            return self._compile(constraint)
        self._compiled[constraint] = compiled
        return compiled.deep_copy()

    def _compile(self, constraint: Constraint) -> LLMatcher:
        """A new matcher, remembered."""
        from llguidance import LLMatcher, grammar_from
        from llguidance.gbnf_to_lark import is_lark_syntax

        try:
            if constraint.regex is not None:
                text = grammar_from("regex", constraint.regex)
            elif constraint.grammar is not None:
                written = constraint.grammar
                text = grammar_from("grammar", written if is_lark_syntax(written) else decoded(written))
            else:
                schema = '{"type": "object"}' if constraint.json_object else str(constraint.json_schema)
                refuse_repetition(schema)
                # A schema may bring options of its own.
                own = '"x-guidance"' in schema
                text = LLMatcher.grammar_from_json_schema(
                    schema, defaults=None if own else {"whitespace_pattern": WHITESPACE}
                )
        except (ValueError, RecursionError) as error:
            raise UserError(f"the {constraint.kind} cannot be used: {_sentence(str(error))}") from error
        compiled = LLMatcher(self._tokenizer, text, log_level=0)
        if compiled.is_error():
            raise UserError(f"the {constraint.kind} cannot be used: {_sentence(compiled.get_error())}")
        self._compiled[constraint] = compiled
        # Another thread may do the same meanwhile.
        for old in list(self._compiled)[:-KEPT_COMPILED]:
            self._compiled.pop(old, None)
        return compiled.deep_copy()


class GrammarState:
    """Where one request stands in its grammar.

    A *path* is a tuple of tokens behind the committed ones. End-of-text is allowed exactly where the grammar may end.
    """

    def __init__(self, grammars: Grammars, renew: Callable[[], LLMatcher], matcher: LLMatcher) -> None:
        self._grammars, self._renew, self._matcher = grammars, renew, matcher
        self._committed: list[int] = []
        self._stand: tuple[int, ...] = ()
        """The path that the matcher has consumed."""
        self._known: dict[tuple[int, ...], Bits | None] = {}

    def bits(self, path: tuple[int, ...]) -> Bits | None:
        """The tokens allowed behind a path; None if the path is forbidden itself, or ends the text."""
        if path not in self._known:
            self._known[path] = self._compute(path)
        return self._known[path]

    def accepts(self, path: tuple[int, ...]) -> bool:
        """Whether the output may go on with these tokens."""
        if not path:
            return True
        above = self.bits(path[:-1])
        return above is not None and bool(above[path[-1] >> 3] >> (path[-1] & 7) & 1)

    def masks(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Bool [paths, vocabulary]: the tokens allowed behind each, as `packed`."""
        count = self._grammars.vocabulary
        return torch.from_numpy(
            np.unpackbits(self.packed(paths), axis=1, count=count, bitorder="little").view(np.bool_)
        )

    def packed(self, paths: Sequence[Sequence[int]]) -> Bits:
        """[paths, bytes]: the tokens allowed behind each.

        Everything is allowed behind a path that cannot come about: its row is never used, but must be a distribution.
        """
        rows = [self.bits(tuple(path)) for path in paths]
        return np.stack([self._grammars.every_bit if row is None or not row.any() else row for row in rows])

    def length(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens it takes to the end, where nothing but end-of-text may follow; None if more may."""
        for count in range(1, len(tokens) + 1):
            if self._is_over(tuple(tokens[:count])):
                return count
        return None

    def completes(self, tokens: Sequence[int]) -> bool:
        """Whether the text may end behind these tokens."""
        bits = self.bits(tuple(tokens))
        return bits is not None and bool((bits & self._grammars.end_bits).any())

    def _is_over(self, path: tuple[int, ...]) -> bool:
        """Whether no text may follow: the grammar is complete, or in a dead end."""
        bits = self.bits(path)
        return bits is None or not (bits & self._grammars.text_bits).any()

    def fit(self, draft: Draft) -> Draft:
        """The draft without the nodes that the grammar forbids or never reaches, and what is below them.

        Sampled children stay: the rule counts on all that were drawn, and rejects the forbidden ones by itself.
        """
        below = draft.children()
        paths: dict[int, tuple[int, ...]] = {ROOT: ()}
        waiting = [ROOT]
        # Depth first, so that the matcher takes each step of the tree once.
        while waiting:
            node = waiting.pop()
            if self._is_over(paths[node]):
                continue
            drawn = draft.drawn.get(node)
            for rank, child in enumerate(below.get(node, ())):
                path = (*paths[node], draft.tokens[child])
                sampled = drawn is not None and (drawn.count is None or rank < drawn.count)
                if sampled or self.accepts(path):
                    paths[child] = path
                    waiting.append(child)
        del paths[ROOT]
        return draft if len(paths) == len(draft) else draft.subset(sorted(paths))

    def commit(self, tokens: Sequence[int]) -> None:
        """Tokens were appended to the output; paths start behind them from now on."""
        ends = self._grammars.ends
        done = tuple(tokens)
        if any(token in ends for token in done):
            return
        if not self._move(done):
            self._restart()
        self._stand = ()
        self._committed += done
        count = len(done)
        self._known = {path[count:]: bits for path, bits in self._known.items() if path[:count] == done}

    def _compute(self, path: tuple[int, ...]) -> Bits | None:
        if path and (path[-1] in self._grammars.ends or not self.accepts(path)):
            return None
        if self._move(path):
            text = self._grammars.text_bits
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8, count=text.size) & text
            may_end = self._matcher.is_accepting()
            if not self._matcher.is_error():
                return bits | self._grammars.end_bits if may_end else bits
        self._restart()
        return None

    def _move(self, path: tuple[int, ...]) -> bool:
        """Bring the matcher to a path; False if it cannot get there."""
        shared = 0
        for mine, wanted in zip(self._stand, path, strict=False):
            if mine != wanted:
                break
            shared += 1
        if shared < len(self._stand):
            self._matcher.rollback(len(self._stand) - shared)
        self._stand = path
        rest = list(path[shared:])
        return self._matcher.try_consume_tokens(rest) == len(rest) and not self._matcher.is_error()

    def _restart(self) -> None:
        """A matcher that met a limit of its own is of no use any more: another one takes its place."""
        self._matcher = self._renew()
        self._matcher.consume_tokens(self._committed)
        self._stand = ()


def _sentence(message: str) -> str:
    """The telling line of a message of several."""
    told = re.search(r"^error: (.+)$", message, re.MULTILINE)
    return (told[1] if told else message.strip().partition("\n")[0]).strip().rstrip(".")
