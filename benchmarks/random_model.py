"""A checkpoint of random weights in a chosen shape, with the tokenizer of `tiny`: for what a step costs, not for text.

python benchmarks/random_model.py FOLDER [--layers 12] [--hidden 640] [--ffn 1760] [--heads 10] [--kv-heads 5]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.model.checkpoint import resolve
from hasten.model.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--ffn", type=int, default=1760)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--kv-heads", type=int, default=5)
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve("tiny"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            intermediate_size=options.ffn,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters in {options.folder}")


if __name__ == "__main__":
    main()
