"""Plain decoding beside transformers' `generate`: same weights, same prompt, same run, in turns.

    python benchmarks/transformers_generate.py [--tokens 128] [--rounds 5] [--json]

Models: the shipped `tiny` (float32) and random weights of a 0.37 B Llama shape (bf16).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hasten.engine import Engine, SamplingParams
from hasten.model import load_model
from hasten.model.checkpoint import resolve

BIG = LlamaConfig(
    vocab_size=16384,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def random_weights(folder: Path) -> Path:
    """Save the 0.37 B shape with random bf16 weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(BIG)
    model = model.to_empty(device="cpu").bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def compare(name: str, folder: Path, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of both engines' tokens per second, and the median of their ratio round by round."""
    ours = Engine(load_model(folder, dtype=dtype))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    prompt = torch.randint(2, theirs.config.vocab_size, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)

    def run_ours() -> tuple[float, list[int]]:
        started = time.perf_counter()
        request = ours.add(prompt, params)[0]
        for _ in ours.run():
            pass
        return time.perf_counter() - started, request.output

    def run_theirs() -> tuple[float, list[int]]:
        started = time.perf_counter()
        with torch.inference_mode():
            output = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        return time.perf_counter() - started, output[0, len(prompt) :].tolist()

    run_ours(), run_theirs()
    pairs = [(run_ours(), run_theirs()) for _ in range(rounds)]
    first = next((i for i, (a, b) in enumerate(zip(pairs[0][0][1], pairs[0][1][1], strict=False)) if a != b), tokens)
    return {
        "model": name,
        "dtype": dtype,
        "hasten": round(statistics.median(tokens / mine[0] for mine, _ in pairs), 1),
        "transformers": round(statistics.median(tokens / other[0] for _, other in pairs), 1),
        "ratio": round(statistics.median(other[0] / mine[0] for mine, other in pairs), 3),
        "same_tokens": first,
        "of": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    rows = [compare("tiny", resolve("tiny"), "float32", arguments.tokens, arguments.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        big = random_weights(Path(folder))
        rows.append(compare("0.37B random", big, "bfloat16", min(arguments.tokens, 48), max(3, arguments.rounds - 2)))
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2))
        return
    print(f"{'model':>14} {'dtype':>9} {'hasten':>9} {'transformers':>13} {'ratio':>6}  same tokens")
    for row in rows:
        print(
            f"{row['model']:>14} {row['dtype']:>9} {row['hasten']:>9} {row['transformers']:>13} {row['ratio']:>6}  "
            f"{row['same_tokens']} of {row['of']}"
        )


if __name__ == "__main__":
    main()
