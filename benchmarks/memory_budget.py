"""What a budget of bytes costs: `specmemo` under shrinking budgets, against the same drafter without one.

    python benchmarks/memory_budget.py [--drafter SPEC] [--batch N] [--per-task N] [--plot FILE.svg] [--json]

Bytes are the KV cache, the logits that verification looks at, the masks of trees, and the drafter; weights and
activations are not counted. `whole context` is what reserving the longest possible sequence and the largest tree would
take. The retention point is the smallest budget that keeps 96 % of the speed without one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hasten import LLM, SamplingParams
from hasten.bench.suite import load_suite
from hasten.documents import dumps
from hasten.engine import Engine
from hasten.engine.memory import logits_bytes, mask_bytes

SHARES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0)
"""Budgets, as multiples of the least."""
RETAINED = 0.96


@dataclass
class Point:
    """One way to decode the prompts: the bytes it held at most, by purpose, and what came of it."""

    name: str
    budget: int | None
    kv: int
    logits: int
    masks: int
    drafter: int
    peak: int
    tokens_per_second: float
    tokens_per_step: float
    identical: bool


class Way:
    """A method with an engine of its own."""

    def __init__(self, llm: LLM, name: str, method: str, budget: int | None = None) -> None:
        self.name, self.method, self.budget = name, method, budget
        self.engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=llm.engine.target.folder)
        self.drafter = self.engine.drafter(method)[1]
        self.seconds: list[float] = []
        self.tokens = self.steps = self.held = self.peak = 0
        self.outputs: list[list[int]] = []

    def decode(self, prompts: list[list[int]], params: SamplingParams) -> None:
        """One batch."""
        started = time.perf_counter()
        requests = [self.engine.add(prompt, params, self.method)[0] for prompt in prompts]
        steps = 0
        while self.engine.busy:
            self.engine.step()
            steps += 1
            if steps % 8 == 1:
                self.held = max(self.held, self.drafter.memory_bytes)
                self.peak = max(self.peak, self.engine.ledger.last.total + self.drafter.memory_bytes)
        self.seconds.append(time.perf_counter() - started)
        for request in requests:
            if request.error is not None:
                raise request.error
        self.tokens += sum(len(request.output) for request in requests)
        self.steps += sum(request.statistics.steps for request in requests)
        self.outputs += [request.output for request in requests]

    def forget(self) -> None:
        """Begin the figures anew; what the drafter has learned stays."""
        self.seconds, self.outputs = [], []
        self.tokens = self.steps = 0

    def point(self, expected: list[list[int]]) -> Point:
        most = self.engine.ledger.most
        return Point(
            self.name,
            self.budget,
            most.kv,
            most.logits,
            most.masks,
            self.held,
            self.peak,
            self.tokens / sum(self.seconds),
            self.tokens / self.steps,
            self.outputs == expected,
        )


def measure(llm: LLM, drafter: str, batch: int, per_task: int, tokens: int) -> dict[str, Any]:
    """All ways in turns, batch by batch; medians would hide that a small budget makes some batches wait."""
    prompts = [llm.encode(prompt.prompt) for prompt in load_suite("tasks", per_task)]
    params = SamplingParams(max_tokens=tokens)
    vocabulary, cache = llm.model.config.vocab_size, llm.engine.cache
    longest = max(map(len, prompts)) + tokens
    least = cache.block_bytes(longest) + logits_bytes(1, vocabulary)
    ways = [Way(llm, "plain", "plain"), Way(llm, drafter, drafter)]
    for share in SHARES:
        budget = int(least * share)
        ways.append(Way(llm, f"{share:g} x least", f"specmemo:budget={budget},drafter={drafter}", budget))
    for way in ways:
        # Whoever comes first pays for what is made once.
        way.decode(prompts[:batch], params)
        way.forget()
    for start in range(0, len(prompts), batch):
        for way in ways:
            way.decode(prompts[start : start + batch], params)
    expected = ways[0].outputs
    points = [way.point(expected) for way in ways]
    context, nodes = llm.model.config.max_positions, 64
    reference = batch * (cache.block_bytes(context + nodes) + logits_bytes(nodes + 1, vocabulary) + mask_bytes(nodes))
    unbounded = points[1].tokens_per_second
    kept = [point for point in points[2:] if point.tokens_per_second >= RETAINED * unbounded]
    return {
        "drafter": drafter,
        "batch": batch,
        "prompts": len(prompts),
        "least_bytes": least,
        "whole_context_bytes": reference + points[1].drafter,
        "retention_bytes": min((point.peak for point in kept), default=None),
        "points": [asdict(point) for point in points],
    }


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    unbounded = result["points"][1]["tokens_per_second"]
    print(f"{result['prompts']} prompts, batch {result['batch']}, drafter {result['drafter']}")
    print(f"{'':28}{'budget':>12}{'peak':>12}{'kv':>12}{'logits':>10}{'drafter':>10}{'tok/step':>9}{'share':>7}  same")
    for point in result["points"]:
        budget = "" if point["budget"] is None else f"{point['budget']:,}"
        print(
            f"{point['name']:28}{budget:>12}{point['peak']:>12,}{point['kv']:>12,}{point['logits']:>10,}"
            f"{point['drafter']:>10,}{point['tokens_per_step']:>9.2f}{point['tokens_per_second'] / unbounded:>7.2f}"
            f"  {'yes' if point['identical'] else 'NO'}"
        )
    print(f"whole context reserved: {result['whole_context_bytes']:,} bytes")
    if result["retention_bytes"] is not None:
        share = result["retention_bytes"] / result["whole_context_bytes"]
        print(f"{RETAINED:.0%} of the speed in {result['retention_bytes']:,} bytes ({share:.0%} of that)")


def draw(result: dict[str, Any], path: str) -> None:
    """Speed against the budget with the retention point, and the bytes by purpose."""
    from matplotlib import pyplot

    points = [point for point in result["points"] if point["budget"] is not None]
    plain, unbounded = (result["points"][index]["tokens_per_second"] for index in (0, 1))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    mega = 1e-6
    left.plot([p["peak"] * mega for p in points], [p["tokens_per_second"] / unbounded for p in points], "o-")
    left.axhline(plain / unbounded, linestyle=":", color="grey", label="plain decoding")
    left.axhline(RETAINED, linestyle="--", color="grey", linewidth=0.8)
    if result["retention_bytes"] is not None:
        left.axvline(result["retention_bytes"] * mega, color="tab:red", linewidth=0.8, label=f"{RETAINED:.0%} kept")
    left.set(xlabel="peak bytes, MB", ylabel="speed, share of no budget", ylim=(0, None))
    left.legend(frameon=False)
    names, floor = [p["name"] for p in points], [0.0] * len(points)
    for purpose in ("kv", "logits", "drafter"):
        values = [p[purpose] * mega for p in points]
        right.barh(names, values, left=floor, label=purpose)
        floor = [a + b for a, b in zip(floor, values, strict=True)]
    right.set(xlabel="most bytes by purpose, MB")
    right.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--drafter", default="token-recycling:nodes=32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--per-task", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--plot", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    llm = LLM(options.model, backend=options.backend)
    result = measure(llm, options.drafter, options.batch, options.per_task, options.tokens)
    print(dumps(result, indent=2)) if options.json else show(result)
    if options.plot:
        draw(result, options.plot)


if __name__ == "__main__":
    main()
