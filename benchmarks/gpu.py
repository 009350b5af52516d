"""What a GPU gives: steps of random models beside the memory's speed, methods beside transformers' compiled decoding.

    python benchmarks/gpu.py [--shapes 1b,8b] [--contexts 64,4096] [--model tiny] [--methods NAMES] [--tokens 128]
                             [--rounds 10] [--out gpu.json]

Steps: milliseconds for 1 to 64 rows of one sequence, with bf16 weights made on the device, by PyTorch (eager), by
captured graphs, by these without unified maxima of the softmax, and with rows that do not depend on each other
(invariant); `v` is the cost over that of one row, `bandwidth` the share of the measured read bandwidth at which one row
reads the weights.
Methods: tokens per second, greedy, batch 1, in turns with transformers' `generate` on a static cache, which compiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import LLM, SamplingParams, UserError
from hasten.bench.suite import load_suite
from hasten.cache import Cache
from hasten.documents import dumps
from hasten.model import Decoder, LayerConfig, ModelConfig, Rows
from hasten.model.architectures import ARCHITECTURES
from hasten.model.assembly import assemble
from hasten.model.cuda import refusal
from hasten.model.decoder import Backend, TorchBackend

ROWS = (1, 2, 4, 8, 16, 32, 64)
METHODS = "ngram,suffix,token-recycling,draft-model,auto"


@dataclass(frozen=True)
class Shape:
    """Of a Llama model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),
}


class RandomTensors:
    """Stands where a checkpoint's tensors do: weights of any name and shape, made on the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __contains__(self, name: str) -> bool:
        return False

    def get(self, name: str, *shape: int) -> Tensor:
        """Norms of ones, everything else small noise."""
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.fill_(1.0) if "norm" in name else made.normal_(0.0, 0.02)

    def stacked(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """One below the other."""
        return self.get(names[0], sum(shape[0] for shape in shapes), *shapes[0][1:])

    def maybe_stacked(self, names: list[str], shapes: list[tuple[int, ...]]) -> None:
        """No biases."""


def random_model(shape: Shape, contexts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Decoder:
    """A Llama model of this shape."""
    half = shape.head_dim // 2
    config = ModelConfig(
        architecture="llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        max_positions=max(contexts) + ROWS[-1],
        norm_eps=1e-5,
        tied_head=shape.tied,
        layers=(LayerConfig("attention", shape.heads, shape.kv_heads, shape.head_dim, shape.ffn),) * shape.layers,
        inverse_frequencies=tuple(5e5 ** (-index / half) for index in range(half)),
    )
    tensors: Any = RandomTensors(dtype, device)
    return assemble(config, ARCHITECTURES["llama"].pieces(config, tensors), TorchBackend(), dtype)


def backends() -> dict[str, Backend]:
    """Who runs the step; imported late, because it needs Triton."""
    from hasten.model.cuda.backend import CudaBackend

    return {
        "eager": TorchBackend(),
        "graph": CudaBackend(),
        "graph, running maxima": CudaBackend(unified=False),
        "graph, invariant": CudaBackend(invariant=True),
    }


def read_bandwidth(device: torch.device, count: int = 2**30) -> float:
    """Bytes per second (in 1e9) that the device reads, or reads and writes, the better one: the best of twenty."""
    buffer, other = (torch.ones(count, dtype=torch.float32, device=device) for _ in range(2))
    best = 0.0
    for moved, work in ((buffer.nbytes, buffer.sum), (2 * buffer.nbytes, lambda: other.copy_(buffer))):
        for _ in range(20):
            best = max(best, moved / seconds(work, device))
    return best / 1e9


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of a piece of work, until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


@torch.inference_mode()
def steps(model: Decoder, context: int, rounds: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Medians of every backend and number of rows behind a context, all in turns."""
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(model.config.vocab_size, (context + ROWS[-1],), generator=generator).tolist()
    sequence = cache.sequence()
    sequence.reserve(len(text))
    for start in range(0, context, 512):
        piece = text[start : min(start + 512, context)]
        TorchBackend().forward(model, Rows.of(sequence, piece, start, model.device), [0], None)
        sequence.commit(len(piece))
    passes = {count: Rows.of(sequence, text[context : context + count], context, model.device) for count in ROWS}
    models = {name: replace(model, backend=backend) for name, backend in backends().items()}
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 2):
        for count, rows in passes.items():
            for name, each in models.items():
                taken = seconds(lambda each=each, rows=rows: each.forward(rows), model.device)
                # The first turns compile and capture.
                if turn >= 2:
                    times.setdefault((name, count), []).append(taken)
    for name in models:
        one = statistics.median(times[name, 1])
        for count in ROWS:
            median = statistics.median(times[name, count])
            yield {
                "backend": name,
                "context": context,
                "rows": count,
                "ms": round(median * 1e3, 4),
                "v": round(median / one, 3),
                "bandwidth": round(model.weight_bytes() / median / 1e9 / bandwidth, 3) if count == 1 else None,
            }


def methods(model: str, names: list[str], tokens: int, per_task: int, device: torch.device) -> list[dict[str, Any]]:
    """Tokens per second of each method and of transformers, prompt by prompt in turns."""
    from transformers import AutoModelForCausalLM

    llm = LLM(model, device=device.type, backend="torch")
    reason = refusal(llm.model.config, llm.model.dtype, device)
    if reason is not None:
        raise UserError(f"the CUDA backend cannot run {model}: {reason}")
    llm.model.backend = backends()["graph"]
    # Of a GGUF file transformers is told the folder and the name.
    file = {"gguf_file": llm.folder.name} if llm.folder.is_file() else {}
    where = llm.folder.parent if file else llm.folder
    theirs = AutoModelForCausalLM.from_pretrained(where, **file, dtype=llm.model.dtype).to(device).eval()
    prompts = [llm.encode(prompt.prompt) for prompt in load_suite("spec", per_task)]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    outputs: dict[str, list[list[int]]] = {}

    def ours(prompt: list[int], name: str) -> list[int]:
        return llm.generate([prompt], params, name)[0].token_ids

    @torch.inference_mode()
    def peer(prompt: list[int], _: str) -> list[int]:
        out = theirs.generate(
            torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
        )
        return out[0, len(prompt) :].tolist()

    runs = {"plain": ours, **dict.fromkeys(names, ours), "transformers, static cache, compiled": peer}
    taken = dict.fromkeys(runs, 0.0)
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for name, run in runs.items():
            output: list[list[int]] = []
            spent = seconds(lambda r=run, p=prompt, n=name, to=output: to.append(r(p, n)), device)
            # The first prompt comes twice: once to warm up.
            if turn:
                taken[name] += spent
                outputs.setdefault(name, []).append(output[0])
    total, plain = tokens * len(prompts), taken["plain"]
    return [
        {
            "method": name,
            "tokens_per_second": round(total / taken[name], 1),
            "speedup": round(plain / taken[name], 3),
            "identical": sum(a == b for a, b in zip(outputs[name], outputs["plain"], strict=True)),
            "prompts": len(prompts),
        }
        for name in runs
    ]


def show(result: dict[str, Any]) -> None:
    print(f"{result['device']}: {result['bandwidth_gbs']:.0f} GB/s")
    for shape, rows in result["steps"].items():
        print(f"\n{shape:<26}{'context':>8}{'rows':>6}{'ms':>10}{'v':>8}{'bandwidth':>11}")
        for row in rows:
            share = "" if row["bandwidth"] is None else f"{row['bandwidth']:.0%}"
            print(f"{row['backend']:<26}{row['context']:>8}{row['rows']:>6}{row['ms']:>10}{row['v']:>8}{share:>11}")
    print(f"\n{'method':<38}{'tokens/s':>10}{'speed-up':>10}{'identical':>12}")
    for row in result["methods"]:
        same = f"{row['identical']} of {row['prompts']}"
        print(f"{row['method']:<38}{row['tokens_per_second']:>10}{row['speedup']:>10}{same:>12}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--contexts", default="64,4096")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--per-task", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    shapes = [name for name in options.shapes.split(",") if name]
    if unknown := [name for name in shapes if name not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]}; there are {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    contexts = tuple(int(context) for context in options.contexts.split(","))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "bandwidth_gbs": read_bandwidth(device),
        "steps": {},
        "methods": [],
    }
    try:
        for name in shapes:
            model = random_model(SHAPES[name], contexts, torch.bfloat16, device)
            measured: list[dict[str, Any]] = []
            for context in contexts:
                print(f"{name}, context {context}", file=sys.stderr)
                measured += steps(model, context, options.rounds, result["bandwidth_gbs"])
            result["steps"][name] = measured
            del model
            torch.cuda.empty_cache()
            options.out.write_text(dumps(result, indent=1))
        print(f"{options.model}, methods", file=sys.stderr)
        names = [name for name in options.methods.split(",") if name]
        result["methods"] = methods(options.model, names, options.tokens, options.per_task, device)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.write_text(dumps(result, indent=1))
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
