"""Which ways to decode in batches give plain decoding's tokens: exact and partial matches, in percent (2510.22876).

    python benchmarks/equivalence.py [--model M] [--draft M] [--prompts N] [--tokens N] [--batches 1,4] [--methods a,b]

Greedy, float32. `exact`: answers that are the same as decoded alone without a drafter; `partial`: the part of them
before the first other token. Ways over the padded cache come with rows into which a known bug was put: these
are to fail, where drafts are rejected at all (`--suite`), and two of the three at a batch of one as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from hasten import LLM, SamplingParams
from hasten.bench.suite import load_suite
from hasten.engine import registry
from hasten.engine.creation import is_lossless
from hasten.errors import UserError
from hasten.methods.batching import speculation
from hasten.methods.batching.eqspec import eqspec
from hasten.methods.batching.exspec import exspec
from hasten.methods.batching.padded import PaddedCache
from hasten.methods.batching.rollback import rollback
from hasten.methods.batching.speculation import Pair, Text
from hasten.model.checkpoint import resolve
from hasten.model.loading import load_model


@contextmanager
def bonus_of_the_drafter() -> Iterator[None]:
    """The token behind what is right is the drafter's, not the target's."""
    own = speculation.accepted

    def wrong(draft: Sequence[int], choices: Sequence[int]) -> list[int]:
        right = own(draft, choices)
        return list(draft[: len(right)]) or right

    with patch.object(speculation, "accepted", wrong):
        yield


@contextmanager
def rejected_tokens_stay() -> Iterator[None]:
    """The cache keeps what was rejected, and forgets as much at the beginning."""
    own = PaddedCache.aligned

    def late(cache: PaddedCache, pieces: Sequence[tuple[int, int, int]]) -> PaddedCache:
        return own(cache, [(row, cache.slots - (stop - start), cache.slots) for row, start, stop in pieces])

    with patch.object(PaddedCache, "aligned", late):
        yield


@contextmanager
def rows_are_not_moved() -> Iterator[None]:
    """Keys and values stay where they were when a row's padding changes."""
    own = PaddedCache.aligned

    def still(cache: PaddedCache, pieces: Sequence[tuple[int, int, int]]) -> PaddedCache:
        longest = max(stop - start for _, start, stop in pieces)
        moved, left = own(cache, pieces), own(cache, [(row, 0, longest) for row, _, _ in pieces])
        return replace(left, content=moved.content, positions=moved.positions)

    with patch.object(PaddedCache, "aligned", still):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--draft", default="tiny-draft")
    parser.add_argument("--suite", default="prose")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--methods", default="plain,ngram,draft-model,suffix", help="or all: each lossless drafter")
    options = parser.parse_args()
    llm = LLM(options.model, dtype="float32")
    prompts = [llm.encode(each.prompt) for each in load_suite(options.suite, options.prompts)][: options.prompts]
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    wanted = [llm.generate([prompt], params, "plain")[0].choices[0].token_ids for prompt in prompts]
    target, drafter = (load_model(resolve(name), "float32", "cpu", "torch") for name in (options.model, options.draft))

    def engine(method: str) -> Callable[[int], list[list[int]]]:
        def run(batch: int) -> list[list[int]]:
            made: list[list[int]] = []
            for start in range(0, len(prompts), batch):
                answers = llm.generate(prompts[start : start + batch], params, method)
                made += [answer.choices[0].token_ids for answer in answers]
            return made

        return run

    def over_padding(way: Callable[..., None]) -> Callable[[int], list[list[int]]]:
        def run(batch: int) -> list[list[int]]:
            texts = [Text(list(prompt), len(prompt) + options.tokens) for prompt in prompts]
            way(Pair(target, drafter), texts, batch=batch)
            return [text.tokens[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

        return run

    def with_bug(bug: Any) -> Callable[[int], list[list[int]]]:
        def run(batch: int) -> list[list[int]]:
            with bug():
                return over_padding(eqspec)(batch)

        return run

    methods = lossless(llm) if options.methods == "all" else options.methods.split(",")
    ways = {f"engine: {method}": engine(method) for method in methods}
    ways |= {way.__name__: over_padding(way) for way in (eqspec, exspec, rollback)}
    ways |= {
        f"eqspec, {bug.__name__}": with_bug(bug)
        for bug in (bonus_of_the_drafter, rejected_tokens_stay, rows_are_not_moved)
    }
    batches = [int(batch) for batch in options.batches.split(",")]
    print(f"{'exact / partial, %':30}" + "".join(f"{'B' + str(batch):>14}" for batch in batches))
    for name, way in ways.items():
        cells = [matches(way(batch), wanted) for batch in batches]
        print(f"{name:30}" + "".join(f"{exact:7.1f}/{partial:5.1f} " for exact, partial in cells), flush=True)


def lossless(llm: LLM) -> list[str]:
    """Each registered lossless drafter that the model can have."""
    found = []
    for slug, method in registry.methods().items():
        if method.role == "drafter" and is_lossless(slug):
            try:
                llm.engine.drafter(slug)
            except UserError as error:
                print(f"{slug}: {error}", file=sys.stderr)
                continue
            found.append(slug)
    return found


def matches(got: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Exact and partial matches, in percent."""
    shares = []
    for one, other in zip(got, wanted, strict=True):
        same = next(
            (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        shares.append(same / max(1, len(one), len(other)))
    return 100 * sum(share == 1 for share in shares) / len(shares), 100 * sum(shares) / len(shares)


if __name__ == "__main__":
    main()
