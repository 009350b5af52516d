"""Prefill of many prompts of different lengths: padded, sorted by length, prepacked, and as the engine packs rows.

    python benchmarks/prepacking.py [--model M] [--prompts N] [--batches N]

Per batch: tokens that went through the model, time (the quicker of two passes), and `waste`, the padded batch's tokens
by the prompts' own. All four give the logits behind every prompt.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import torch

from hasten.cache import Cache
from hasten.methods.batching.prepacking import length_sorted, padded, prepacked
from hasten.model import Rows
from hasten.model.checkpoint import resolve
from hasten.model.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batches", type=int, default=5)
    options = parser.parse_args()
    model = load_model(resolve(options.model), "float32", "cpu", "torch")
    rng = random.Random(0)

    def packed_rows(prompts: list[list[int]]) -> int:
        cache = Cache(model.config.layers, model.cache_dtype, model.device)
        rows = Rows.of_several([(cache.sequence(), prompt, 0) for prompt in prompts])
        model.forward(rows, [span.stop - 1 for span in rows.spans])
        return len(rows.tokens)

    ways: dict[str, Callable[[list[list[int]]], int]] = {
        "padded": lambda prompts: padded(model, prompts).processed,
        "sorted": lambda prompts: length_sorted(model, prompts).processed,
        "prepacked": lambda prompts: prepacked(model, prompts).processed,
        "engine": packed_rows,
    }
    for number in range(options.batches):
        # From prompts of one length to a long tail of them.
        spread = 1.2 * number / max(1, options.batches - 1)
        lengths = [max(1, min(512, int(40 * math.exp(spread * rng.gauss(0, 1))))) for _ in range(options.prompts)]
        prompts = [[rng.randrange(3, model.config.vocab_size) for _ in range(length)] for length in lengths]
        print(
            f"waste {len(prompts) * max(lengths) / sum(lengths):.2f}, longest {max(lengths)}, all {sum(lengths)} tokens"
        )
        taken: dict[str, list[float]] = {name: [] for name in ways}
        processed = {}
        # In turns, so that what else the machine does falls on all alike; the first one warms up.
        for _ in range(5):
            for name, way in ways.items():
                started = time.perf_counter()
                processed[name] = way(prompts)
                taken[name].append(time.perf_counter() - started)
        for name, seconds in taken.items():
            ratio = min(taken["padded"]) / min(seconds)
            print(f"  {name:10} {processed[name]:6} tokens {1000 * min(seconds):8.1f} ms  {ratio:5.2f} times")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
