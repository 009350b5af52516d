"""Requests that share a prefix: what a step and a whole answer take, with what they share read once and without.

    python benchmarks/sharing.py steps [--model M] [--batches 1,4,16,32] [--prefixes 256,1024,2048,4096] [--own 64]
    python benchmarks/sharing.py answers [--model M] [--batches 1,4,16,32] [--prefixes 2048] [--own 32] [--tokens 32]

`steps`: milliseconds of a decoding step. `once`: the prefix is in one block, and read once for all rows (Hydragen).
`each`: it is in one block, and read for each sequence, as paged caches do. `copies`: each sequence has its own. `none`:
without a prefix, which no way of attending can be quicker than. They take turns; of their rounds the quick ones. Beside
them the megabytes of keys and values that a step reads by the formula, P + b u slots or b (P + u), and that are held.

`answers`: tokens per second of requests that come together, prompts included, by an engine that shares what prompts
begin with (`prefix_bytes`) and by one that reads each prompt. Tokens are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from systems import quick

from hasten import LLM, SamplingParams
from hasten.bench.lane import engine_for
from hasten.cache import Cache, SequenceCache, SlotCache
from hasten.cache.slots import BlockView
from hasten.engine import Engine
from hasten.model import Decoder, Rows

WORDS = 1000
"""Token ids that texts are made of."""
ROUNDS = 11


def clock() -> float:
    """Of one thread, its own time: other processes may be at work. Several wait for each other."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def text(count: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(3, WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def once(base: SequenceCache) -> SequenceCache:
    return base.fork()


def copies(base: SequenceCache) -> SequenceCache:
    """What others see is not changed in place: without its last slot, all is written anew."""
    copy = base.fork()
    copy.evict([copy.length - 1])
    return copy


def each(base: SequenceCache) -> SequenceCache:
    """A slot of its own in front, so that no two sequences begin alike."""
    fork = base.fork()
    for group in fork.groups:
        assert isinstance(group, SlotCache)
        first = group._cache.block(group._group, 1)
        first.keys.zero_()
        first.values.zero_()
        first.positions.zero_()
        group._views.insert(0, BlockView(first, 1))
        group.length += 1
    fork.length += 1
    return fork


def none(base: SequenceCache) -> SequenceCache:
    fork = base.fork()
    fork.crop(0)
    return fork


WAYS: dict[str, Callable[[SequenceCache], SequenceCache]] = {"once": once, "each": each, "copies": copies, "none": none}


@torch.inference_mode()
def read(model: Decoder, sequence: SequenceCache, tokens: list[int]) -> None:
    for start in range(0, len(tokens), 512):
        piece = tokens[start : start + 512]
        model.forward(Rows.of(sequence, piece, sequence.length), ())
        sequence.commit(len(piece))


@torch.inference_mode()
def steps(model: Decoder, batches: list[int], prefixes: list[int], own: int) -> None:
    """Prints what a step takes, way by way."""
    channels = sum(
        layer.slots.heads * (layer.slots.key_width + layer.slots.value_width) for layer in model.config.layers
    )
    slot = channels * model.cache_dtype.itemsize
    print(f"{'prefix':>7}{'batch':>6}" + "".join(f"{name + ', ms':>12}" for name in WAYS), end="")
    print(f"{'each/once':>11}{'copies/once':>13}{'of none':>9}{'MB once':>9}{'MB each':>9}{'held':>7}{'copies':>8}")
    for prefix in prefixes:
        cache = Cache(model.config.layers, model.cache_dtype, model.device)
        base = cache.sequence()
        base.reserve(prefix)
        read(model, base, text(prefix, 0))
        for batch in batches:
            rows, held = {}, {}
            for name, way in WAYS.items():
                before = cache.used_bytes
                sequences = [way(base) for _ in range(batch)]
                for sequence in sequences:
                    sequence.reserve(own + 1)
                model.forward(Rows.of_several([(each, text(own, n), prefix) for n, each in enumerate(sequences)]), ())
                for sequence in sequences:
                    sequence.commit(own)
                held[name] = cache.used_bytes - before
                rows[name] = Rows.of_several([(each, [5], prefix + own) for each in sequences])
            times: dict[str, list[float]] = {name: [] for name in WAYS}
            for turn in range(ROUNDS + 1):
                for name, found in times.items():
                    started = clock()
                    model.forward(rows[name])
                    if turn:
                        found.append(clock() - started)
            took = {name: 1000 * quick(found) for name, found in times.items()}
            megabytes = [slot * slots / 1e6 for slots in (prefix + batch * own, batch * (prefix + own))]
            print(f"{prefix:>7}{batch:>6}" + "".join(f"{took[name]:>12.1f}" for name in WAYS), end="")
            print(f"{took['each'] / took['once']:>11.2f}{took['copies'] / took['once']:>13.2f}", end="")
            print(f"{took['none'] / took['once']:>9.0%}" + "".join(f"{size:>9.0f}" for size in megabytes), end="")
            print(f"{held['once'] / 1e6 + base.nbytes() / 1e6:>7.0f}{held['copies'] / 1e6:>8.0f}", flush=True)
            for pass_rows in rows.values():
                for span in pass_rows.spans:
                    assert isinstance(span.sequence, SequenceCache)
                    span.sequence.release()


def answers(llm: LLM, batches: list[int], prefixes: list[int], own: int, tokens: int) -> None:
    """Prints tokens per second with and without."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    print(f"{'prefix':>7}{'batch':>6}{'shared, tok/s':>15}{'apart, tok/s':>14}{'ratio':>7}  same")
    for prefix in prefixes:
        for batch in batches:
            prompts = [text(prefix, 0) + text(own, 1 + number) for number in range(batch)]
            found = []
            for prefix_bytes in (2**40, 0):
                plain = engine_for(llm)
                engine = Engine(plain.model, plain.tokenizer, plain.end_ids, prefix_bytes=prefix_bytes)
                started = clock()
                requests = [engine.add(prompt, params)[0] for prompt in prompts]
                for _ in engine.run():
                    pass
                found.append((clock() - started, [request.output for request in requests]))
            rates = [batch * tokens / seconds for seconds, _ in found]
            print(f"{prefix:>7}{batch:>6}{rates[0]:>15.1f}{rates[1]:>14.1f}{rates[0] / rates[1]:>7.2f}", end="")
            print("  yes" if found[0][1] == found[1][1] else "  NO", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "answers"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--weights", default="dense")
    parser.add_argument("--batches", default="1,4,16,32")
    parser.add_argument("--prefixes", default="256,1024,2048,4096")
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    llm = LLM(options.model, backend=options.backend, weights=options.weights)
    batches, prefixes = ([int(each) for each in given.split(",")] for given in (options.batches, options.prefixes))
    print(f"{options.model}, {llm.model.backend.name}, {options.weights}, {torch.get_num_threads()} threads")
    if options.what == "steps":
        steps(llm.model, batches, prefixes, options.own)
    else:
        answers(llm, batches, prefixes, options.own, options.tokens)


if __name__ == "__main__":
    main()
