"""Speculation as a system: what its step times are, beside the laws that they should follow.

    python benchmarks/systems.py mirror [--model M] [--draft FOLDER] [--suite S] [--per-task N] [--tokens N]
    python benchmarks/systems.py easyspec [--model M] [--draft FOLDER] ...

`mirror`: Mirror-SD with the target on one core and the drafter on another, by layer and width: how often the middle
layer foresaw the verdict, and how much of the answer's distribution it foresees; a step's seconds by the law and as
measured, and which layer and width have the least; tokens per second; beside plain decoding and the same two models in
turn (`draft-model`), on one core and on both. Tokens are compared with plain decoding's.

`easyspec`: seconds of the draft model's fuzzy pass by attention layers at once, on one worker and on several, beside
the critical path that its parts give, and what a row's way to another process and back would take; then tokens per
second and acceptance, with and without calibration (not with `--passes-only`).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.bench.lane import engine_for
from hasten.bench.suite import load_suite
from hasten.cache import Cache
from hasten.methods.drafters.small_model import find_small_model
from hasten.methods.systems.clock import Clock
from hasten.methods.systems.easyspec import critical_path, groups
from hasten.methods.systems.executors import Process
from hasten.methods.systems.mirror import Mirror
from hasten.model import Decoder, Rows, Taps
from hasten.model.native.grouped import Spent, grouped


class Way:
    """A method, and what it made of the prompts, one after the other."""

    def __init__(
        self, llm: LLM, spec: str, prompts: list[list[int]], params: SamplingParams, drafter_core: int | None = None
    ) -> None:
        engine = engine_for(llm)
        self.drafter = engine.drafter(spec)[1]
        self.drafter.prepare()
        if drafter_core is not None:
            # Not one of those of this process, of which the method would choose.
            assert isinstance(self.drafter, Mirror) and isinstance(self.drafter.executor, Process)
            os.sched_setaffinity(self.drafter.executor.pid, [drafter_core])
        self.outputs: list[list[int]] = []
        started, steps, self.proposed, self.accepted = time.perf_counter(), 0, 0, 0
        for prompt in prompts:
            request = engine.add(prompt, params, spec)[0]
            list(engine.run())
            self.outputs.append(request.output)
            steps += request.statistics.steps
            self.proposed += request.statistics.proposed
            self.accepted += request.statistics.accepted
        self.seconds = time.perf_counter() - started
        self.tokens = sum(map(len, self.outputs))
        self.per_step = self.tokens / max(1, steps)

    def line(self, name: str, plain: Way) -> str:
        same = "" if self.outputs == plain.outputs else "  OTHER TOKENS"
        speed = self.tokens / self.seconds
        factor = plain.seconds / self.seconds
        return f"{name:34} {speed:8.1f} tokens/s  {factor:5.2f}x  {self.per_step:5.2f} per step{same}"


def mirror(llm: LLM, options: argparse.Namespace, prompts: list[list[int]], params: SamplingParams) -> None:
    """Mirror-SD by layer and width."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        raise SystemExit("mirror needs two cores")
    draft = f"model={options.draft or 'auto'},confidence={options.confidence},length={options.length}"
    plain = Way(llm, "plain", prompts, params)
    print(plain.line("plain, all cores", plain))
    print(Way(llm, f"draft-model:{draft}", prompts, params).line("draft-model, all cores", plain))
    os.sched_setaffinity(0, mine[:-1])
    torch.set_num_threads(len(mine) - 1)
    print(Way(llm, "plain", prompts, params).line("plain, a core less", plain))
    print(Way(llm, f"draft-model:{draft}", prompts, params).line("draft-model, a core less", plain))
    depth = len(llm.model.config.layers)
    layers = sorted({max(1, depth // 4), max(1, depth // 2), max(1, 3 * depth // 4)})
    masses = overlap(
        llm, [prompt + output for prompt, output in zip(prompts, plain.outputs, strict=True)], prompts, layers
    )
    steps: dict[tuple[int, int], float] = {}
    for layer in layers:
        print(f"layer {layer}: mass of the answer on its " + ", ".join(f"{k} {mass:.0%}" for k, mass in masses[layer]))
        for width in options.widths:
            spec = f"mirror-sd:executor=process,pin=false,{draft},layer={layer},width={width}"
            way = Way(llm, spec, prompts, params, drafter_core=mine[-1])
            print(way.line(f"mirror-sd, layer {layer}, width {width}", plain))
            assert isinstance(way.drafter, Mirror)
            clock = way.drafter.clock
            print(f"    {law(clock, rendezvous(way.drafter))}")
            steps[layer, width] = clock.step / max(1, clock.steps)
            # Its process ends now, and not in the middle of a step of the next one.
            del way
            gc.collect()
        print("    foreseen by width: " + ", ".join(f"{k} {clock.hit_rate(k):.0%}" for k in range(1, width + 1)))
    layer, width = min(steps, key=steps.__getitem__)
    print(f"choice: mirror-sd:layer={layer},width={width} ({1000 * steps[layer, width]:.2f} ms per step)")


@torch.inference_mode()
def overlap(
    llm: LLM, texts: list[list[int]], prompts: list[list[int]], layers: list[int]
) -> dict[int, list[tuple[int, float]]]:
    """Overlap mass by layer: how much of the target's distribution its likeliest tokens in the middle have, by how many
    these are, on the average of all answers' tokens."""
    masses: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for text, prompt in zip(texts, prompts, strict=True):
        taps = Taps(("input", layer) for layer in layers)
        sequence = Cache(llm.model.config.layers, llm.model.cache_dtype, llm.model.device).sequence()
        answer = range(len(prompt) - 1, len(text) - 1)
        final = llm.model.forward(Rows.of(sequence, text, 0), answer, taps).softmax(-1)
        for layer in layers:
            likely = llm.model.logits(taps["input", layer][answer.start : answer.stop], None).topk(8).indices
            masses[layer].append(final.gather(1, likely).cumsum(1))
    means = {layer: torch.cat(rows).mean(0).tolist() for layer, rows in masses.items()}
    return {layer: [(width, mean[width - 1]) for width in (1, 2, 4, 8)] for layer, mean in means.items()}


def rendezvous(drafter: Mirror) -> float:
    """Seconds per step that messages take: one that is told, one that is asked."""
    times = []
    for _ in range(200):
        started = time.perf_counter()
        drafter.executor.ask("held")
        times.append(time.perf_counter() - started)
    return 1.5 * quick(times)


def law(clock: Clock, meeting: float) -> str:
    """A step of Mirror-SD, term by term, in milliseconds; `meeting` as of `rendezvous`."""
    steps = max(1, clock.steps)
    ms = {name: 1000 * getattr(clock, name) / steps for name in ("below", "looking", "above", "rolling", "fallback")}
    terms = "  ".join(f"{name} {value:.2f}" for name, value in ms.items())
    hits, step = clock.hits / max(1, clock.windows), clock.step / steps
    told = clock.law / steps + meeting
    return (
        f"hits {hits:.0%}  {terms}  rendezvous {1000 * meeting:.2f}  law {1000 * told:.2f}  "
        f"measured {1000 * step:.2f} ms ({step / told:.3f})"
    )


def easyspec(llm: LLM, options: argparse.Namespace, prompts: list[list[int]], params: SamplingParams) -> None:
    """EasySpec by attention layers at once."""
    name = options.draft or "auto"
    model = find_small_model("easyspec", llm.engine.target, name, "auto").load()
    assert isinstance(model, Decoder)
    workers = min(options.workers, torch.get_num_threads())
    print(f"a round trip between two processes: {1e6 * exchange(model.config.hidden_size):.0f} us")
    passes = Passes(model, workers)
    for _ in range(options.rounds):
        passes.take_turns()
    for parallel in PARALLEL:
        print(passes.line(parallel))
    if options.passes_only:
        return
    plain = Way(llm, "plain", prompts, params)
    print(plain.line("plain", plain))
    for parallel in PARALLEL:
        rates = []
        for calibration in ("true", "false"):
            spec = f"easyspec:model={name},parallel={parallel},calibration={calibration},confidence=0,length=4"
            way = Way(llm, spec, prompts, params)
            rates.append(f"{way.accepted / max(1, way.proposed):.3f}")
            if calibration == "true":
                print(way.line(f"easyspec, parallel {parallel}", plain))
        print(f"    accepted {rates[0]}, without calibration {rates[1]}")
    print(Way(llm, f"draft-model:model={name},confidence=0,length=4", prompts, params).line("draft-model", plain))


PARALLEL = range(1, 6)
"""Layers at once."""


class Passes:
    """One row's fuzzy passes behind 256 slots, by layers at once: on one worker, on several, in turns.

    Attributes:
        measured: seconds of whole passes, by layers at once and workers.
        parts: of the same passes.
    """

    def __init__(self, model: Decoder, workers: int) -> None:
        self.model, self.workers = model, workers
        self.sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
        model.forward(Rows.of(self.sequence, [3] * 256, 0), ())
        self.sequence.commit(256)
        self.measured: dict[tuple[int, int], list[float]] = {}
        self.parts: dict[tuple[int, int], list[Spent]] = {}

    def sizes(self, parallel: int) -> list[int]:
        return [len(group) for group in groups(len(self.model.layers), parallel)]

    def take_turns(self) -> None:
        """A pass of each kind."""
        for parallel in PARALLEL:
            for workers in {1, self.workers}:
                rows = Rows.of(self.sequence, [3], 256)
                started = time.perf_counter()
                parts = grouped(self.model, rows, [0], self.sizes(parallel), workers)[1]
                self.measured.setdefault((parallel, workers), []).append(time.perf_counter() - started)
                self.parts.setdefault((parallel, workers), []).append(parts)

    def line(self, parallel: int) -> str:
        """Measured beside modelled: a layer's attention as one worker has it by itself, all else as they share it."""
        sizes = self.sizes(parallel)
        one, several = (quick(self.measured[parallel, workers]) for workers in (1, self.workers))
        alone, shared = (typical(self.parts[parallel, workers]) for workers in (1, self.workers))
        # What a pass takes beside its parts: the way into native code and back.
        calling = one - critical_path(alone, sizes, 1)
        grown = [size > 1 for size in sizes for _ in range(size)]
        pairs = zip(alone.attention, shared.attention, grown, strict=True)
        parts = shared._replace(attention=[mine if inside else theirs for mine, theirs, inside in pairs])
        modelled, beside = (calling + critical_path(each, sizes, self.workers) for each in (parts, shared))
        ideal = calling + critical_path(parts, sizes, parallel)
        return (
            f"parallel {parallel}: one worker {1e6 * one:8.1f} us, {self.workers} workers {1e6 * several:8.1f} us; "
            f"modelled {1e6 * modelled:8.1f} ({several / modelled:.3f}), with attention as it is beside others "
            f"{1e6 * beside:8.1f} ({several / beside:.3f}); on {parallel} devices {1e6 * ideal:8.1f} us"
        )


def quick(seconds: Sequence[float]) -> float:
    """The tenth percentile: what other processes took of the machine is left out."""
    return sorted(seconds)[len(seconds) // 10]


def typical(parts: list[Spent]) -> Spent:
    """The same of each part."""
    attention = [quick(layer) for layer in zip(*(each.attention for each in parts), strict=True)]
    fed = [quick(layer) for layer in zip(*(each.feed_forward for each in parts), strict=True)]
    return Spent(attention, fed, quick([each.head for each in parts]))


def exchange(hidden: int) -> float:
    """Seconds to hand a row to another process by a pipe, and to have one back."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=echo, args=(theirs,), daemon=True)
    process.start()
    row, times = bytes(4 * hidden), []
    for _ in range(300):
        started = time.perf_counter()
        ours.send_bytes(row)
        ours.recv_bytes()
        times.append(time.perf_counter() - started)
    ours.close()
    process.join()
    return quick(times)


def echo(pipe: Connection) -> None:
    """Send back what comes, until nothing does."""
    with suppress(EOFError):
        while True:
            pipe.send_bytes(pipe.recv_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mirror", "easyspec"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--draft", help="folder of the draft model; by default the one beside the model")
    parser.add_argument("--suite", default="spec")
    parser.add_argument("--per-task", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--confidence", type=float, default=0.0)
    parser.add_argument("--widths", type=lambda text: [*map(int, text.split(","))], default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, default=2, help="threads that compute a group of attention layers")
    parser.add_argument("--rounds", type=int, default=100, help="passes of each kind, in turns")
    parser.add_argument("--passes-only", action="store_true", help="no decoding")
    options = parser.parse_args()
    llm = LLM(options.model)
    texts = [prompt.prompt for prompt in load_suite(options.suite, options.per_task)]
    prompts = [llm.tokenizer(text)["input_ids"] for text in texts]
    params = SamplingParams(max_tokens=options.tokens)
    {"mirror": mirror, "easyspec": easyspec}[options.what](llm, options, prompts, params)


if __name__ == "__main__":
    main()
