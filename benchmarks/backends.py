"""A forward pass by PyTorch and by the native step, in turns: milliseconds by rows, and what further rows cost.

python benchmarks/backends.py [--model FOLDER] [--context 64] [--rounds 60] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hasten.cache import Cache
from hasten.model import Rows, load_model
from hasten.model.checkpoint import resolve

ROWS = (1, 2, 4, 8, 12, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    models = {name: load_model(resolve(options.model), "float32", "cpu", name) for name in ("torch", "native")}
    config = models["torch"].config
    text = torch.randint(config.vocab_size, (options.context + ROWS[-1],), generator=torch.Generator().manual_seed(0))
    cache = Cache(config.layers, torch.float32, torch.device("cpu"))
    sequence = cache.sequence()
    sequence.reserve(len(text))
    models["torch"].forward(Rows.of(sequence, text[: options.context].tolist(), 0), [0])
    sequence.commit(options.context)
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(options.rounds + 3):
        for count in ROWS:
            rows = Rows.of(sequence, text[options.context : options.context + count].tolist(), options.context)
            for name, model in models.items():
                started = time.perf_counter()
                model.forward(rows)
                if turn >= 3:
                    times.setdefault((name, count), []).append(time.perf_counter() - started)
    seconds = {key: statistics.median(values) for key, values in times.items()}
    gigabytes = models["torch"].weight_bytes() / 1e9
    print(f"{options.model}: {gigabytes:.3f} GB of weights, {torch.get_num_threads()} threads")
    print(f"{'rows':>5}{'torch, ms':>12}{'v':>6}{'native, ms':>13}{'v':>6}{'ratio':>7}{'native, GB/s':>14}")
    for count in ROWS:
        reference, native = seconds["torch", count], seconds["native", count]
        print(
            f"{count:>5}{1e3 * reference:>12.3f}{reference / seconds['torch', 1]:>6.2f}"
            f"{1e3 * native:>13.3f}{native / seconds['native', 1]:>6.2f}{reference / native:>7.2f}"
            f"{gigabytes / native:>14.1f}"
        )


if __name__ == "__main__":
    main()
