"""A checkpoint of random weights in a chosen shape, with the tokenizer of `tiny`: for what a step costs, not for text.

python benchmarks/random_model.py FOLDER [--shape 57m|91m|370m] [--dtype float32]
    [--layers N] [--hidden N] [--ffn N] [--heads N] [--kv-heads N] [--vocabulary N]

Sizes that are given replace the shape's. A vocabulary above the tokenizer's leaves ids that stand for no text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.model.checkpoint import resolve
from hasten.model.tokenizer import load_tokenizer

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocabulary")
SHAPES = {
    "57m": (12, 640, 1760, 10, 5, 2048),
    "91m": (8, 1024, 2816, 16, 4, 2048),
    "370m": (24, 896, 4864, 14, 2, 16384),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="57m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int)
    options = parser.parse_args()
    shape = dict(zip(SIZES, SHAPES[options.shape], strict=True))
    shape |= {size: getattr(options, size) for size in SIZES if getattr(options, size) is not None}
    tokenizer = load_tokenizer(resolve("tiny"))
    if shape["vocabulary"] < len(tokenizer):
        parser.error(f"--vocabulary must be at least the tokenizer's {len(tokenizer)}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.to(getattr(torch, options.dtype)).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters in {options.folder}")


if __name__ == "__main__":
    main()
