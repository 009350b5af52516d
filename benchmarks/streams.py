"""What streams of Mirror-SD's drafter are worth: its passes per window and their time, with none and with each number.

    python benchmarks/streams.py --draft FOLDER [--model M] [--suite S] [--per-task N] [--tokens N] [--width N]

`passes`: of one chain, without streams, with streams behind its last token, and with all guesses read: streams pay
where a pass gives more tokens than it costs. Where the drafter has none, this is all, of two that know nothing.
`anew`: windows behind every few tokens of what the target says, which know nothing of each other; numbers of streams
take turns. `chains`: those behind all candidates of Mirror-SD's own steps, in this process, as far as they go: nobody
waits, nothing overlaps. `steps`: with the drafter in a process and on a core of its own, from one window to the next
(`--process`). Times of the first two are medians. What comes is compared with what comes without streams.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from systems import quick

from hasten import LLM, SamplingParams
from hasten.bench.lane import engine_for
from hasten.bench.suite import load_suite
from hasten.cache import Cache
from hasten.engine.sampling.bans import Bans
from hasten.methods.drafters.small_model import find_small_model
from hasten.methods.systems.executors import Inline
from hasten.methods.systems.mirror import Mirror
from hasten.methods.systems.rollouts import Opening, Rollouts
from hasten.methods.systems.streams import Streams
from hasten.model import Decoder, Rows
from hasten.model.threads import cores

EVERY = 8
"""Tokens of a text from one window to the next."""


class Anew:
    """Windows along texts, by a drafter of so many streams.

    Attributes:
        windows: one behind the other.
        passes, seconds: of each.
    """

    def __init__(self, llm: LLM, options: argparse.Namespace, streams: int) -> None:
        checkpoint = find_small_model("mirror-sd", llm.engine.target, options.draft, "auto")
        sizes = options.length, options.confidence, options.width, streams
        self._made = Rollouts(checkpoint, Path(llm.folder), frozenset(), *sizes)
        self._vocabulary = llm.model.config.vocab_size
        self.streams = streams
        self.windows: list[list[int]] = []
        self.passes: list[int] = []
        self.seconds: list[float] = []

    def open(self, prompt: list[int]) -> None:
        nothing = Bans(set(), 0, set())
        self._made.open(Opening(0, prompt, SamplingParams(), 0, self._vocabulary, nothing, 1000))

    def go_on(self, came: list[int]) -> None:
        started = time.perf_counter()
        (window,), spent = self._made.windows([(0, came)])
        self.seconds.append(time.perf_counter() - started)
        self.windows.append(window.tokens)
        self.passes.append(spent.passes)


class Waiting(Inline):
    """Finishes all chains before it hears the verdict.

    Attributes:
        passes, seconds: per step.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        super().__init__(rollouts)
        self._own = rollouts
        self.passes: list[int] = []
        self.seconds: list[float] = []

    def ask(self, name: str, *arguments: Any) -> Any:
        # Not when it is told of the candidates: then a pass of the target is under way.
        if name == "windows":
            started = time.perf_counter()
            passes = sum(iter(self._own.round, False))
            if passes:
                self.passes.append(passes)
                self.seconds.append(time.perf_counter() - started)
        return super().ask(name, *arguments)


@torch.inference_mode()
def passes(model: Decoder, most: int) -> None:
    """Prints what passes of one chain behind 256 tokens take, by streams, and what they must give to pay."""
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    model.forward(Rows.of(sequence, [3] * 256, 0), ())
    sequence.commit(256)
    plain = timed(lambda: model.forward(Rows.of(sequence, [3], 256)))
    print(f"passes, 0 streams: {1000 * plain:.2f} ms")
    for count in range(1, most + 1):
        streams = Streams(torch.zeros(count, model.config.hidden_size), len(model.layers) // 2)

        def say(read: int, streams: Streams = streams) -> None:
            said = streams.forward(model, Rows.of(sequence, [3] * read, 256), range(read), range(read))
            streams.logits(model, said.states[-1:])

        one, all_of_them = timed(partial(say, 1)), timed(partial(say, 1 + count))
        print(
            f"passes, {count} streams: {1000 * one:.2f} ms, with all guesses read {1000 * all_of_them:.2f} ms: "
            f"{all_of_them / plain:.2f} tokens per pass to pay"
        )


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, of some the quick ones."""
    times = []
    for _ in range(60):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return quick(times)


def anew(llm: LLM, options: argparse.Namespace, texts: Sequence[tuple[list[int], list[int]]], most: int) -> None:
    """Prints windows that are begun anew."""
    ways = [Anew(llm, options, streams) for streams in range(most + 1)]
    for prompt, answer in texts:
        for way in ways:
            way.open(prompt)
        for start in range(0, len(answer), EVERY):
            for way in ways:
                way.go_on(answer[start - EVERY : start] if start else [])
    for way in ways:
        same = "" if way.windows == ways[0].windows else "  OTHER WINDOWS"
        tokens, passes, windows = sum(map(len, way.windows)), sum(way.passes), len(way.windows)
        print(
            f"anew, {way.streams} streams: {passes / windows:.2f} passes per window of {tokens / windows:.2f} tokens, "
            f"{tokens / passes:.2f} tokens per pass, {1000 * median(way.seconds):.2f} ms per window{same}"
        )


def chains(llm: LLM, options: argparse.Namespace, prompts: list[list[int]], most: int) -> None:
    """Prints what chains behind candidates take."""
    outputs = []
    for streams in range(most + 1):
        engine, spec = engine_for(llm), _spec(options, streams, "inline")
        drafter = engine.drafter(spec)[1]
        assert isinstance(drafter, Mirror) and drafter.executor.rollouts is not None
        drafter.executor = waiting = Waiting(drafter.executor.rollouts)
        requests = []
        for prompt in prompts:
            requests += engine.add(prompt, SamplingParams(max_tokens=options.tokens), spec)
            list(engine.run())
        outputs.append([request.output for request in requests])
        same = "" if outputs[-1] == outputs[0] else "  OTHER TOKENS"
        steps, clock = len(waiting.passes), drafter.clock
        print(
            f"chains, {streams} streams: {sum(waiting.passes) / steps:.2f} passes per step, "
            f"{1000 * median(waiting.seconds):.2f} ms, hits {clock.hits / max(1, clock.windows):.0%}{same}"
        )


def steps(llm: LLM, options: argparse.Namespace, prompts: list[list[int]], most: int) -> None:
    """Prints whole steps, with the drafter in its process."""
    for streams in range(most + 1):
        engine, spec = engine_for(llm), _spec(options, streams, "process")
        tokens, started = 0, 0.0
        for number, prompt in enumerate([prompts[0], *prompts]):
            if number == 1:
                started = time.perf_counter()
            request = engine.add(prompt, SamplingParams(max_tokens=options.tokens), spec)[0]
            list(engine.run())
            tokens += len(request.output) if number else 0
        seconds, drafter = time.perf_counter() - started, engine.drafter(spec)[1]
        assert isinstance(drafter, Mirror)
        clock = drafter.clock
        ms = {name: 1000 * getattr(clock, name) / clock.steps for name in ("rolling", "fallback", "waiting", "step")}
        terms = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
        print(f"steps, {streams} streams: {terms} ms, {tokens / seconds:.1f} tokens/s")


def _spec(options: argparse.Namespace, streams: int, executor: str) -> str:
    sizes = f"length={options.length},confidence={options.confidence},width={options.width},layer={options.layer}"
    return f"mirror-sd:executor={executor},model={options.draft},streams={streams},{sizes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", required=True, help="folder of a drafter with streams")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--suite", default="lists")
    parser.add_argument("--per-task", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--confidence", type=float, default=0.0)
    parser.add_argument("--process", action="store_true", help="also with the drafter in a process of its own")
    options = parser.parse_args()
    # The last core is the drafter's.
    torch.set_num_threads(max(1, cores() - 1))
    llm = LLM(options.model)
    prompts = [llm.encode(each.prompt) for each in load_suite(options.suite, options.per_task)]
    checkpoint = find_small_model("mirror-sd", llm.engine.target, options.draft, "auto")
    model = checkpoint.load()
    assert isinstance(model, Decoder)
    own = Streams.load(checkpoint.folder, model)
    passes(model, 2 if own is None else len(own))
    if own is None:
        return
    most, answers = len(own), llm.generate(prompts, SamplingParams(max_tokens=options.tokens), "plain")
    anew(llm, options, [(prompt, each.token_ids) for prompt, each in zip(prompts, answers, strict=True)], most)
    chains(llm, options, prompts, most)
    if options.process:
        steps(llm, options, prompts, most)


if __name__ == "__main__":
    main()
