"""How many feed-forward layers FFN-SkipLLM really passes by, beside what was asked for, by kind of text.

python benchmarks/skipping.py [--model M] [--ratios 0.05,0.25] [--tokens N]
"""

from __future__ import annotations

import argparse
from itertools import islice

from hasten import LLM, SamplingParams
from hasten.bench.lane import engine_for
from hasten.bench.suite import load_suite
from hasten.methods.skipping.ffn_skipllm import FfnSkipLlm, FfnSkipLlmParameters
from hasten.tasks import prose_chunks

OPENING = 32
"""Tokens of a page of prose that the model goes on with."""


def passed_by(llm: LLM, drafter: FfnSkipLlm, prompts: list[list[int]], params: SamplingParams) -> float:
    """The share of feed-forward layers that the answers' rows pass by."""
    engine = engine_for(llm)
    drafter.passed = drafter.rows = 0
    for prompt in prompts:
        engine.add(prompt, params, drafter)
    for _ in engine.run():
        pass
    return drafter.passed / (drafter.rows * len(llm.model.layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--ratios", default="0.05,0.15,0.25,0.35")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    llm, params = LLM(options.model), SamplingParams(max_tokens=options.tokens)
    kinds = {
        "28 list operations": [llm.encode(prompt.prompt) for prompt in load_suite("lists", 4)],
        "one of each task": [llm.encode(prompt.prompt) for prompt in load_suite("tasks", 1)],
        "six pages of prose": [llm.encode(text)[:OPENING] for text in islice(prose_chunks("test", 512), 6)],
    }
    for ratio in map(float, options.ratios.split(",")):
        drafter = FfnSkipLlm(llm.engine.target, FfnSkipLlmParameters(ratio=ratio, warmup=0))
        found = [f"{kind} {passed_by(llm, drafter, prompts, params):.0%}" for kind, prompts in kinds.items()]
        print(f"ratio {ratio:g}: calibrated {drafter.regions.share:.0%}; {', '.join(found)}")


if __name__ == "__main__":
    main()
