"""VocabTrim: a small model drafts with the rows of its head that the target has a use for.

"VOCABTRIM: Vocabulary Pruning for Efficient Speculative Decoding in LLMs", 2025, arXiv 2506.22694. Exactness: lossless.

A small drafter's head is a large part of it: [vocabulary, hidden] weights, read at every draft step. Most tokens are
never said. So tokens are counted on calibration text, the head keeps the rows of the `tokens` most frequent and of a
few that must never miss (end of text and other special tokens, bytes, digits, space, line feed), and drafts are made
among those: softmax, filters and noise work on the kept rows, and only the chosen tokens are mapped back. The input
embedding stays complete, since any token may be committed. Verification is untouched: by the rejection rules q is the
softmax over the kept tokens and 0 elsewhere, so other tokens come from the residual, and the law is the target's.

The paper finds text that the target wrote (`source=target`) better than other people's. It names no forced set and no
amount of text, so both are choices made here. Equal counts are filled in the order of token ids: in a vocabulary built
by merges, low ids are frequent. The kept set suits the work that it was counted on; text in other words or scripts
drafts worse. With tied embeddings the kept rows are a copy: traffic falls, memory does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from hasten.engine import ROOT, Draft, Engine, Observation, Request, SamplingParams, Target, register
from hasten.errors import UserError
from hasten.files import json_line
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters
from hasten.methods.drafters.words import Words
from hasten.model import Decoder, Model
from hasten.model.weights import HEAD, Piece

ANSWER_TOKENS, ANSWERED_PROMPTS = 128, 200
"""How much the target writes for `source=target`."""
EXAMPLES_PER_TASK, PROSE_DOCUMENTS, PROSE_CHARACTERS = 50, 100, 4000
"""How much of the built-in tasks and prose is counted."""
NEVER_MISSED = "0123456789 \n"


@dataclass(frozen=True)
class VocabTrimParameters(DraftModelParameters):
    """Parameters of `draft-model`, and of the head.

    Attributes:
        tokens: rows to keep, beside the forced ones; 0 is a quarter of the vocabulary.
        calibration: a file, of JSON lines with a `prompt` (and perhaps an `answer`) or of plain text, one per line;
            `tasks` takes the training split of the built-in tasks and prose.
        source: what is counted: `text` as it stands, or what the `target` answers to it.
        forced: whether end of text, special tokens, bytes, digits, space and line feed are kept in any case.

    Raises:
        UserError: out of range.
    """

    slug: ClassVar[str] = "vocabtrim"

    tokens: int = 0
    calibration: str = "tasks"
    source: str = "text"
    forced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0:
            raise UserError("vocabtrim: tokens must be 0 (a quarter of the vocabulary) or positive")
        if self.source not in ("text", "target"):
            raise UserError(f"vocabtrim: source must be text or target, not {self.source!r}")


@register(
    "vocabtrim",
    family="drafters",
    exactness="lossless",
    paper="2506.22694",
    title="VocabTrim: a small model whose head has frequent words",
    parameters=VocabTrimParameters,
)
class VocabTrim(DraftModel):
    """`draft-model` in a space of its own, of the kept tokens.

    Attributes:
        kept: the tokens that have a row.
        coverage: share of the calibration tokens that are kept.
        inside, outside: rejections so far, by whether the token that came instead is kept. Many outside ask for more
            tokens or other calibration text.
    """

    plain_tokens: ClassVar[bool] = False

    def __init__(self, target: Target, parameters: VocabTrimParameters) -> None:
        super().__init__(target, parameters)
        if self.words is not None:
            raise UserError("vocabtrim: this drafter knows few tokens already, which draft-model does with")
        counts = self._count(target, parameters)
        size = target.model.config.vocab_size
        if parameters.tokens > size:
            raise UserError(f"vocabtrim: tokens must be at most {size}, which the vocabulary has")
        if target.tokenizer is not None:
            # Rows beyond the tokenizer's are padding.
            size = min(size, len(target.tokenizer))
        chosen = set(most_frequent(counts, parameters.tokens or max(1, size // 4), size))
        if parameters.forced:
            chosen |= {token for token in forced_tokens(target.tokenizer) | target.end_ids if token < size}
        kept = sorted(chosen)
        self.words = self.kept = Words(kept, self.model.device)
        self.coverage = sum(counts[token] for token in kept) / max(1, counts.total())
        self.model = self._trim(self.model)
        self.inside = self.outside = 0
        self._proposed: dict[int, tuple[int, set[int]]] = {}

    def _count(self, target: Target, parameters: VocabTrimParameters) -> Counter[int]:
        """Occurrences of each token in the calibration text.

        Raises:
            UserError: a target without a tokenizer, or a file that cannot be read.
        """
        if target.tokenizer is None:
            raise UserError("vocabtrim counts tokens of text, and this model has no tokenizer")
        pairs = _built_in() if parameters.calibration == "tasks" else _from_file(Path(parameters.calibration))
        if parameters.source == "target":
            return _answers(target, [prompt for prompt, _ in pairs])
        return Counter(token for pair in pairs for token in _encode(target, "".join(pair)))

    def _trim(self, model: Model) -> Model:
        """The same model with the kept rows of its head, in the model's own kind of storage.

        Raises:
            UserError: a model whose head is no matrix.
        """
        if not isinstance(model, Decoder):
            raise UserError("vocabtrim needs a small model with a head of weights")
        bias = getattr(model.head, "bias", None)
        rows = model.head.dequant()[self.kept.tokens].contiguous()
        piece = Piece(rows, None if bias is None else bias[self.kept.tokens])
        return replace(model, head=model.backend.linear(piece, HEAD))

    @property
    def vocabulary(self) -> int:
        return len(self.kept)

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        drafts = super().propose_all(requests, budgets)
        for request, draft in zip(requests, drafts, strict=True):
            self._proposed[request.id] = len(request.tokens), set(draft.tokens)
        return drafts

    def observe(self, request: Request, seen: Observation) -> None:
        super().observe(request, seen)
        # What was verified may be another drafter's, and what was proposed of an earlier step.
        start, proposed = self._proposed.pop(request.id, (-1, set()))
        own = start == len(request.tokens) - len(seen.tokens) and proposed.issuperset(seen.draft.tokens)
        last = seen.path[-1] if seen.path else ROOT
        if own and last in seen.draft.parents:
            if seen.tokens[-1] in self.kept.number_of:
                self.inside += 1
            else:
                self.outside += 1

    def end(self, request: Request) -> None:
        super().end(request)
        self._proposed.pop(request.id, None)


def most_frequent(counts: Counter[int], number: int, size: int) -> list[int]:
    """The `number` most frequent of `size` tokens; equal counts in the order of ids."""
    return sorted(range(size), key=lambda token: (-counts[token], token))[:number]


def forced_tokens(tokenizer: Any) -> set[int]:
    """Special tokens, byte-fallback tokens, and what digits, a space and a line feed are written with."""
    if tokenizer is None:
        return set()
    vocabulary = tokenizer.get_vocab()
    forced = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    forced |= {vocabulary[name] for name in map("<0x{:02X}>".format, range(256)) if name in vocabulary}
    for character in NEVER_MISSED:
        forced |= set(tokenizer.encode(character, add_special_tokens=False))
    return forced


def _built_in() -> list[tuple[str, str]]:
    """Questions and answers of the built-in tasks' training split, and prose."""
    # Here, because every command imports this file, and the tasks read their own sources when they are imported.
    from hasten.tasks import TASKS, examples, prose_documents

    pairs = [
        (example.prompt, example.answer)
        for task in TASKS
        for example in examples(task, "train", EXAMPLES_PER_TASK, "vocabtrim")
    ]
    return pairs + [(text[:PROSE_CHARACTERS], "") for text in islice(prose_documents("train"), PROSE_DOCUMENTS)]


def _from_file(path: Path) -> list[tuple[str, str]]:
    """Prompts and answers of a calibration file.

    Raises:
        UserError: unreadable, a line that is not what it should be (with its number), or nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabtrim cannot read calibration text from {path}: {error}") from error
    pairs = list(_pairs(path, lines))
    if not pairs:
        raise UserError(f"vocabtrim: {path} has no text")
    return pairs


def _pairs(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            yield line + "\n", ""
            continue
        entry = json_line(path, number, line)
        prompt, answer = (entry.get("prompt"), entry.get("answer", "")) if isinstance(entry, dict) else (None, "")
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise UserError(f"{path}, line {number}: every line needs a string under 'prompt'")
        yield prompt, answer


def _encode(target: Target, text: str) -> list[int]:
    """Token ids, without special ones, and without a warning that the text is longer than the context."""
    ids: list[int] = target.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def _answers(target: Target, prompts: Sequence[str]) -> Counter[int]:
    """Counts of what the target itself says to prompts spread over those given, sampled at temperature 1."""
    engine = Engine(target.model, target.tokenizer, target.end_ids)
    room = target.model.config.max_positions - ANSWER_TOKENS
    stride = -(-len(prompts) // ANSWERED_PROMPTS)
    requests: list[Request] = []
    for number, prompt in enumerate(prompts[::stride]):
        ids = _encode(target, prompt)[: max(1, room)]
        if ids:
            params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=number)
            requests += engine.add(ids, params)
    for _ in engine.run():
        pass
    return Counter(token for request in requests for token in request.output)
