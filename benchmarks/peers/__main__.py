"""hasten beside the engines that people would pick instead: same checkpoint, prompts and tokens, in turns.

    python benchmarks/peers [--checkpoint FOLDER] [--peers NAMES] [--precisions NAMES] [--batches SIZES]
                            [--speculation] [--draft FOLDER] [--prompts SUITES_OR_FILES] [--chat]
                            [--out FOLDER] [--json]
    python benchmarks/peers --list
    python benchmarks/peers --install [--peers NAMES]

A checkpoint is a Hugging Face folder, a GGUF file, or the name of a model that ships or was pulled. A GGUF file is
measured as it stores its weights, on the peers that read it.

Each peer is installed in an environment of its own, once, and reads the checkpoint converted to its format, once.
Ctrl-C loses nothing that was measured; the same command with the same --out goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import show
from catalogue import PEERS, PRECISIONS, STORED
from environments import Unavailable, digest, install, version
from measure import ROOM, Plan, measure
from prompts import encode
from results import Results

from hasten.documents import dumps
from hasten.errors import UserError
from hasten.model.checkpoint import resolve
from hasten.model.loading import read_config

RESULTS, PLOT = "results.json", "tokens_per_second.svg"


def main() -> int:
    """The exit status: 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show the peers and what is installed, and end")
    parser.add_argument("--install", action="store_true", help="install the peers, and end")
    parser.add_argument("--checkpoint", default="tiny", help="folder, GGUF file, or the name of a model")
    parser.add_argument("--draft", help="a smaller model of the same vocabulary, for speculation with it")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--precisions", help=f"default: {','.join(PRECISIONS)}; of a GGUF file {STORED}")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--batch-count", type=int, help="of each size, at most (default: what the prompts fill)")
    parser.add_argument("--speculation", action="store_true", help="each peer's own speculation, too")
    parser.add_argument("--prompts", default="agent,tasks", help="suites of hasten bench, or files of prompts")
    parser.add_argument("--chat", action="store_true", help="put prompts through the chat template")
    parser.add_argument("--prompt-count", type=int, default=16)
    parser.add_argument(
        "--first-token", default="50,512,4000", help="lengths of prompts whose first token is waited for; empty: none"
    )
    parser.add_argument(
        "--predictions", type=int, default=1000, help="rows on which predictions are compared with float32, at most"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds to convert, to load, or for one batch")
    parser.add_argument("--out", type=Path, help=f"folder for {RESULTS}, {PLOT} and the logs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else on stdout")
    options = parser.parse_args()
    # Told to end, it ends its workers first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.list:
            return _list(options.json)
        return _install(_known("peer", options.peers, PEERS)) if options.install else _compare(options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _list(as_json: bool) -> int:
    rows = show.listing(version)
    print(dumps(rows, indent=2)) if as_json else show.peers(rows)
    return 0


def _install(names: Sequence[str]) -> int:
    """Make the environments; the exit status is 1 if one cannot be made."""
    failed = 0
    for name in names:
        try:
            install(PEERS[name], _saying())
            print(f"{name}: {version(PEERS[name])}")
        except Unavailable as error:
            print(f"{name}: {error}")
            failed = 1
    return failed


def _known(what: str, names: str, known: Collection[str]) -> list[str]:
    """The names between commas.

    Raises:
        UserError: one is not known.
    """
    for name in names.split(","):
        if name not in known:
            raise UserError(f"unknown {what} {name!r}: known are {', '.join(known)}")
    return names.split(",")


def _compare(options: argparse.Namespace) -> int:
    """Measure what is asked for and not yet there, and show all that is."""
    _require(options)
    with TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        plan = _plan(options, folder / "logs")
        results = Results(options.out and folder / RESULTS, _settings(options, plan))
        interrupted = False
        try:
            measure(plan, results, _saying())
        except KeyboardInterrupt:
            interrupted = True
        document = results.document()
        if options.out and document["rows"]:
            results.save()
            from plot import draw

            draw(document, folder / PLOT)
    print(dumps(document, indent=2)) if options.json else show.results(document)
    return 130 if interrupted else 0


def _require(options: argparse.Namespace) -> None:
    """Say what this machine lacks now rather than after a long measurement.

    Raises:
        UserError: no matplotlib for the picture, fewer processors than threads.
    """
    if options.out and find_spec("matplotlib") is None:
        raise UserError("the picture in --out needs matplotlib: pip install 'hasten[plots]'")
    processors = len(os.sched_getaffinity(0))
    if options.threads > processors:
        raise UserError(f"{options.threads} threads need as many processors; there are {processors}")


def _plan(options: argparse.Namespace, logs: Path) -> Plan:
    """The plan that the options describe.

    Raises:
        UserError: unknown names, numbers out of range, prompts that do not fit, nothing to read a GGUF file by.
    """
    batches, lengths = _numbers("batches", options.batches), _numbers("first-token", options.first_token or "")
    if not batches:
        raise UserError("give at least one batch size")
    counts = [options.batch_count] if options.batch_count is not None else []
    if min(*batches, *lengths, *counts, options.rounds, options.threads, options.max_tokens) < 1:
        raise UserError("batches, first-token, batch-count, rounds, threads and max-tokens must be at least 1")
    if options.predictions < 0:
        raise UserError("predictions must not be below 0")
    if not options.timeout > 0:
        raise UserError("timeout must be above 0")
    if options.prompt_count < max(batches):
        raise UserError(f"prompt-count must be at least the largest batch, {max(batches)}")
    checkpoint = resolve(options.checkpoint).absolute()
    draft = resolve(options.draft).absolute() if options.draft else None
    if draft and draft.is_file() != checkpoint.is_file():
        raise UserError("the checkpoint and its draft must both be folders, or both GGUF files")
    if checkpoint.is_file() and find_spec("accelerate") is None:
        raise UserError(
            "the reference reads a GGUF file by transformers, which needs accelerate: pip install accelerate"
        )
    kinds = ",".join(PRECISIONS) if checkpoint.is_dir() else STORED
    context = read_config(checkpoint).max_positions
    return Plan(
        checkpoint=checkpoint,
        draft=draft,
        prompts=encode(checkpoint, context, options.prompts, options.prompt_count, options.max_tokens, options.chat),
        lengths=_fitting(lengths, context),
        predictions=options.predictions,
        max_tokens=options.max_tokens,
        peers=_known("peer", options.peers, PEERS),
        precisions=_known("precision", options.precisions or kinds, (*PRECISIONS, STORED)),
        batches=batches,
        batch_count=options.batch_count,
        speculation=options.speculation,
        rounds=options.rounds,
        threads=options.threads,
        timeout=options.timeout,
        logs=logs.absolute(),
    )


def _numbers(what: str, given: str) -> list[int]:
    """The numbers between commas.

    Raises:
        UserError: something else stands there.
    """
    try:
        return [int(number) for number in given.split(",") if number]
    except ValueError:
        raise UserError(f"{what} must be numbers with commas between, not {given!r}") from None


def _fitting(lengths: Sequence[int], context: int) -> list[int]:
    """The lengths of prompts that a context holds with what peers set aside; the others are named on stderr."""
    fitting = [length for length in lengths if length + 2 * ROOM <= context]
    if left := [str(length) for length in lengths if length not in fitting]:
        print(f"prompts of {', '.join(left)} tokens do not fit the context of {context}: left out", file=sys.stderr)
    return fitting


def _settings(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What figures of one document must have in common."""
    return {
        "checkpoint": f"{options.checkpoint} {digest(plan.checkpoint)}",
        "draft": plan.draft and f"{options.draft} {digest(plan.draft)}",
        "prompts": f"{len(plan.prompts)} of {options.prompts} "
        + hashlib.sha256(json.dumps(plan.prompts).encode()).hexdigest()[:12],
        "batch_count": plan.batch_count,
        "max_tokens": plan.max_tokens,
        "predictions": plan.predictions,
        "threads": plan.threads,
    }


def _saying() -> Callable[[str], None]:
    """Progress on stderr: one line that is written over on a terminal, silence elsewhere but for what takes long."""
    terminal = sys.stderr.isatty()

    def say(text: str) -> None:
        if terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif "(once" in text:
            print(text, file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
