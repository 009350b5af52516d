"""Speculation as a system: what its step times are, beside the laws that they should follow.

    python benchmarks/systems.py mirror [--model M] [--draft FOLDER] [--suite S] [--per-task N] [--tokens N]
    python benchmarks/systems.py easyspec [--model M] [--draft FOLDER] ...

`mirror`: Mirror-SD with the target on one core and the drafter on another, by layer and width: how often the middle
layer foresaw the verdict, a step's seconds by the law and as measured, tokens per second; beside plain decoding and the
same two models in turn (`draft-model`), on one core and on both. Tokens are compared with plain decoding's.

`easyspec`: the draft model's attention, MLP and head measured one by one, the seconds per drafted token that they give
on several devices (`critical_path`; a gather is taken to cost nothing unless `--gather` says so), and acceptance by
`parallel`, with and without calibration.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch

from hasten import LLM, SamplingParams
from hasten.bench.suite import load_suite
from hasten.cache import Cache
from hasten.engine import Engine
from hasten.methods.drafters.small_model import find_small_model
from hasten.methods.systems.easyspec import LayerSeconds, critical_path
from hasten.methods.systems.executors import Process
from hasten.methods.systems.mirror import Mirror
from hasten.model import Decoder, Rows


class Way:
    """A method, and what it made of the prompts, one after the other."""

    def __init__(
        self, llm: LLM, spec: str, prompts: list[list[int]], params: SamplingParams, drafter_core: int | None = None
    ) -> None:
        engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=llm.engine.target.folder)
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
    layers = len(llm.model.config.layers)
    for layer in sorted({max(1, layers // 4), max(1, layers // 2), max(1, 3 * layers // 4)}):
        for width in (1, 4, 8):
            spec = f"mirror-sd:executor=process,pin=false,{draft},layer={layer},width={width}"
            way = Way(llm, spec, prompts, params, drafter_core=mine[-1])
            print(way.line(f"mirror-sd, layer {layer}, width {width}", plain))
            assert isinstance(way.drafter, Mirror)
            print(f"    {law(way.drafter)}")


def law(drafter: Mirror) -> str:
    """A step of Mirror-SD, term by term, in milliseconds."""
    clock, steps = drafter.clock, max(1, drafter.clock.steps)
    ms = {name: 1000 * getattr(clock, name) / steps for name in ("below", "looking", "above", "rolling", "fallback")}
    terms = "  ".join(f"{name} {value:.2f}" for name, value in ms.items())
    hits = clock.hits / max(1, clock.windows)
    return (
        f"hits {hits:.0%}  {terms}  law {1000 * clock.law / steps:.2f}  measured {1000 * clock.step / steps:.2f} ms  "
        f"({clock.step / clock.law if clock.law else 0:.3f})"
    )


def easyspec(llm: LLM, options: argparse.Namespace, prompts: list[list[int]], params: SamplingParams) -> None:
    """EasySpec by attention layers at once."""
    name = options.draft or "auto"
    model = find_small_model("easyspec", llm.engine.target, name, "auto").load()
    assert isinstance(model, Decoder)
    seconds, layers = parts(model, options.gather), len(model.layers)
    print(f"attention {1e6 * seconds.attention:.1f}  MLP {1e6 * seconds.mlp:.1f}  head {1e6 * seconds.head:.1f} us")
    plain = Way(llm, "plain", prompts, params)
    for parallel in range(1, 6):
        modelled = critical_path(seconds, layers, parallel)
        rates = []
        for calibration in ("true", "false"):
            spec = f"easyspec:model={name},parallel={parallel},calibration={calibration},confidence=0,length=4"
            way = Way(llm, spec, prompts, params)
            assert way.outputs == plain.outputs, "other tokens than plain decoding's"
            rates.append(f"{way.accepted / max(1, way.proposed):.3f} ({way.per_step:.2f} per step)")
        print(f"parallel {parallel}: {1e6 * modelled:8.1f} us per drafted token on {parallel} devices (modelled); "
              f"accepted {rates[0]}, without calibration {rates[1]}")  # fmt: skip


@torch.inference_mode()
def parts(model: Decoder, gather: float) -> LayerSeconds:
    """Medians over all layers of one row's attention and MLP, behind 256 slots, and of the head."""
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    model.forward(Rows.of(sequence, [3] * 256, 0), ())
    sequence.commit(256)
    attention, mlp, head = [], [], []
    for _ in range(20):
        rows = Rows.of(sequence, [3], 256)
        step, x = model.start(rows), model.embed(rows)
        for layer in model.layers:
            at = [time.perf_counter()]
            x = layer.mix(x, step)
            at.append(time.perf_counter())
            x = layer.feed(x, step)
            at.append(time.perf_counter())
            attention.append(at[1] - at[0])
            mlp.append(at[2] - at[1])
        started = time.perf_counter()
        model.logits(x, None)
        head.append(time.perf_counter() - started)
    return LayerSeconds(median(attention), median(mlp), median(head), gather)


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
    parser.add_argument("--gather", type=float, default=0.0, help="seconds to bring a group's outputs together")
    options = parser.parse_args()
    llm = LLM(options.model)
    texts = [prompt.prompt for prompt in load_suite(options.suite, options.per_task)]
    prompts = [llm.tokenizer(text)["input_ids"] for text in texts]
    params = SamplingParams(max_tokens=options.tokens)
    {"mirror": mirror, "easyspec": easyspec}[options.what](llm, options, prompts, params)


if __name__ == "__main__":
    main()
