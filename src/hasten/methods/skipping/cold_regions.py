"""Where a model's feed-forward layers hardly turn the residual stream, and how alike is alike enough: measured, kept.

The model goes on with pages of the standard library and answers hasten's tasks. What it says is looked at, not what it
reads: how many layers a row passes by depends on the kind of text. A layer is *warm* where its result, added to the
stream, has on the average nearly the direction that the stream had; the longest run of warm layers lies between two
cold regions, which always run. The threshold is the one at which as many layers are passed by as was asked for, found
by halving: each trial reads the texts with the gate in place, since rows that pass by layers change what follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import groupby, islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.cache import Cache
from hasten.documents import dumps
from hasten.engine import Engine, SamplingParams, Target
from hasten.errors import UserError
from hasten.files import cache_folder, write_text, writing
from hasten.methods.skipping.layers import gated
from hasten.model import Decoder, Rows, Taps
from hasten.model.fingerprint import fingerprint
from hasten.model.gate import Gate, cosine

PAGES, OPENING, ANSWER = 8, 32, 64
"""Pages of prose that the model goes on with, tokens of each that it is given, and tokens that it adds at most."""
DIFFICULTY, QUESTION = 0.3, 256
"""Of the tasks, one of each kind; and tokens of a question at most."""
WARM = 0.9
"""Mean cosine of a layer that hardly turns the stream."""
LEAST = 2
"""Warm layers in a row: one to tell by, and one to pass by."""
TRIALS = 10


@dataclass(frozen=True)
class Regions:
    """What a calibration found.

    Attributes:
        first, last: of the warm layers.
        threshold: least cosine.
        outliers: channels that are left out of it.
        share: of all feed-forward layers, that rows passed by.
        cosines: of each layer, the mean.
    """

    first: int
    last: int
    threshold: float
    outliers: tuple[int, ...]
    share: float
    cosines: tuple[float, ...]

    def gate(self, run: int, hidden: int) -> Gate:
        """Of a model of that width."""
        channels = torch.ones(hidden)
        channels[list(self.outliers)] = 0.0
        return Gate(self.first, self.last, run, self.threshold, channels)


@dataclass(frozen=True)
class Page:
    """A text, of which the tokens before `prompt` are a prompt: they go through all layers."""

    tokens: list[int]
    prompt: int


def regions(target: Target, model: Decoder, share: float, run: int, outliers: int) -> Regions:
    """A model's, from disk if they were measured before, else measured now.

    Args:
        share: of all feed-forward layers, that rows should pass by.
        run: as of `Gate`.
        outliers: how many channels, the largest ones, are left out of cosines.

    Raises:
        UserError: the model has no such region, or one that is too small for that share; it has no tokenizer.
    """
    subject = {
        "model": target.folder and str(Path(target.folder).resolve()),
        "fingerprint": fingerprint(model),
        "read": model.weight_bytes(),
        "dtype": str(model.dtype),
        "asked": [share, run, outliers],
        "pages": [PAGES, OPENING, ANSWER, DIFFICULTY, QUESTION],
    }
    name = sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder("ffn-skipllm") / f"{name}.json"
    known = _read(file, len(model.layers), model.config.hidden_size)
    if known is None:
        known = calibrate(model, _pages(target, model), share, run, outliers)
        with suppress(UserError), writing(file):  # It costs a calibration next time, no more.
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, dumps({"subject": subject, **asdict(known)}, indent=1) + "\n")
    return known


def calibrate(model: Decoder, pages: Sequence[Page], share: float, run: int, outliers: int) -> Regions:
    """The warm layers of a model, and the threshold at which the rows of some texts pass by `share` of all layers.

    Args:
        pages: at least one, each with tokens behind its prompt.
        share, run, outliers: as `regions` has them.

    Raises:
        UserError: no layers between the first and the last are warm, or too few for that share.
    """
    before, after = zip(*(_streams(model, page) for page in pages), strict=True)
    one, other = torch.cat(before, 1), torch.cat(after, 1)
    largest = one[1:-1].abs().mean((0, 1)).topk(outliers).indices
    channels = torch.ones(model.config.hidden_size)
    channels[largest] = 0.0
    found = cosine(one, other, channels)
    first, last = _warm(found.mean(1).tolist())
    candidates = found[first : last + 1].flatten().sort().values
    low, high, best = 0, len(candidates) - 1, (-1.0, 0.0)
    gate = Gate(first, last, run, float(candidates[0]), channels)
    most = _passed(model, pages, gate)
    if most < share:
        raise UserError(
            f"ffn-skipllm: rows can pass by {most:.0%} of this model's feed-forward layers at most, "
            f"{last - first + 1} of {len(model.layers)} being warm, so ratio={share:g} is too much"
        )
    best = most, gate.threshold
    for _ in range(TRIALS):
        middle = (low + high + 1) // 2
        threshold = float(candidates[middle])
        passed = _passed(model, pages, Gate(first, last, run, threshold, channels))
        best = min(best, (passed, threshold), key=lambda each: abs(each[0] - share))
        low, high = (middle, high) if passed > share else (low, max(middle - 1, low))
    curve = tuple(round(value, 4) for value in found.mean(1).tolist())
    return Regions(first, last, best[1], tuple(largest.tolist()), round(best[0], 4), curve)


def _warm(cosines: Sequence[float]) -> tuple[int, int]:
    """The longest run of warm layers between the first layer and the last.

    Raises:
        UserError: there is none that is long enough.
    """
    inner = range(1, len(cosines) - 1)
    runs = [list(run) for warm, run in groupby(inner, lambda layer: cosines[layer] >= WARM) if warm]
    longest = max(runs, key=len, default=[])
    if len(longest) < LEAST:
        raise UserError(
            f"ffn-skipllm: this model has nothing to skip: no {LEAST} of its feed-forward layers in a row leave the "
            f"direction of what they are added to nearly as it is (mean cosines up to {max(cosines):.2f})"
        )
    return longest[0], longest[-1]


def _pages(target: Target, model: Decoder) -> list[Page]:
    """Prompts, and what the model says behind them, greedily.

    Raises:
        UserError: the model has no tokenizer, or says nothing.
    """
    if target.tokenizer is None:
        raise UserError("ffn-skipllm: needs a tokenizer, since it is calibrated on text")
    engine = Engine(model, target.tokenizer, target.end_ids, folder=target.folder)
    longest = min(QUESTION, model.config.max_positions - ANSWER)
    prompts = [ids for ids in _prompts(target.tokenizer) if 0 < len(ids) <= longest]
    requests = [engine.add(ids, SamplingParams(max_tokens=ANSWER), "plain")[0] for ids in prompts]
    for _ in engine.run():
        pass
    pages = [Page(request.tokens, request.prompt_length) for request in requests if request.output]
    if not pages:
        raise UserError("ffn-skipllm: is calibrated on what the model says, and it says nothing")
    return pages


def _prompts(tokenizer: Any) -> Iterator[list[int]]:
    """Openings of prose, and a question of each kind, as token ids."""
    # Decoding starts without them.
    from hasten.tasks import TASKS, examples, prose_chunks

    for text in islice(prose_chunks("train", 8 * OPENING), PAGES):
        yield list(tokenizer.encode(text))[:OPENING]
    for task in TASKS:
        yield list(tokenizer.encode(next(examples(task, "train", 1, 0, DIFFICULTY)).prompt))


def _streams(model: Decoder, page: Page) -> tuple[Tensor, Tensor]:
    """The stream before and behind each feed-forward layer, behind the prompt: float32 [layers, rows, hidden]."""
    layers = range(len(model.layers))
    taps = Taps((site, layer) for layer in layers for site in ("input", "attention_output", "output"))
    for sequence in _sequence(model):
        model.forward(Rows.of(sequence, page.tokens, 0, model.device), [len(page.tokens) - 1], taps)
    before = [taps["input", layer].float() + taps["attention_output", layer].float() for layer in layers]
    after = [taps["output", layer].float() for layer in layers]
    return torch.stack(before)[:, page.prompt :].cpu(), torch.stack(after)[:, page.prompt :].cpu()


def _passed(model: Decoder, pages: Sequence[Page], gate: Gate) -> float:
    """The share of all feed-forward layers that the pages' rows behind their prompts pass by."""
    passed = rows = 0
    for page in pages:
        may = torch.arange(len(page.tokens)) >= page.prompt
        for sequence in _sequence(model):
            read = Rows.of(sequence, page.tokens, 0, model.device)
            passed += int(gated(model, read, [len(page.tokens) - 1], gate, may)[1].sum())
        rows += int(may.sum())
    return passed / (rows * len(model.layers))


def _sequence(model: Decoder) -> Iterator[Any]:
    """An empty one, for a while."""
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    yield sequence
    sequence.release()


def _read(file: Path, layers: int, hidden: int) -> Regions | None:
    """A recorded calibration; None where there is none, or none that can be one of such a model."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        numbers = float(record["threshold"]), float(record["share"])
        outliers, cosines = tuple(map(int, record["outliers"])), tuple(map(float, record["cosines"]))
        known = Regions(int(record["first"]), int(record["last"]), numbers[0], outliers, numbers[1], cosines)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    inside = 0 < known.first < known.last < layers - 1 and all(0 <= each < hidden for each in known.outliers)
    return known if inside and all(map(isfinite, numbers)) else None
