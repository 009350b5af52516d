"""What a step takes by batch, greedy and sampled, alone and beside a process that keeps one core busy.

python benchmarks/sampling.py [--model tiny] [--batches 1,16,64] [--steps 60] [--threads 2]

Requests decode plainly. Steps of the two kinds take turns, so whatever else the machine does falls on both alike.
Milliseconds per step, the least and the median.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hasten import LLM, SamplingParams
from hasten.engine import Engine, Limits

PROMPT = "Copy the list: red cat moon\nAnswer:"
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.1},
}


@contextmanager
def busy() -> Iterator[None]:
    """Another process computes meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def engine(llm: LLM, batch: int, steps: int, settings: dict[str, float]) -> Engine:
    """One with a batch of requests that have their first token."""
    made = Engine(llm.model, limits=Limits(sequences=batch))
    prompt = llm.tokenizer(PROMPT)["input_ids"]
    for seed in range(batch):
        made.add(prompt, SamplingParams(max_tokens=steps + 2, ignore_eos=True, seed=seed, **settings))
    while not all(request.started for request in made.scheduler.running) or made.scheduler.waiting:
        made.step()
    return made


def milliseconds(llm: LLM, batch: int, steps: int) -> dict[str, list[float]]:
    """Of steps of each kind, in turns."""
    engines = {kind: engine(llm, batch, steps, settings) for kind, settings in KINDS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(steps):
        for kind, made in engines.items():
            started = time.perf_counter()
            made.step()
            times[kind].append(1000 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    llm = LLM(arguments.model)
    for batch in map(int, arguments.batches.split(",")):
        alone = milliseconds(llm, batch, arguments.steps)
        with busy():
            beside = milliseconds(llm, batch, arguments.steps)
        for kind in KINDS:
            figures = [f(times[kind]) for times in (alone, beside) for f in (min, statistics.median)]
            print(f"batch {batch:3} {kind:10} alone {figures[0]:8.2f} {figures[1]:8.2f}", end="   ")
            print(f"beside {figures[2]:8.2f} {figures[3]:8.2f}")


if __name__ == "__main__":
    main()
