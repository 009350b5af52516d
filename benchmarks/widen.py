"""A larger checkpoint that answers as a small trained one does: real acceptance at the cost of a larger model's step.

python benchmarks/widen.py FOLDER [--checkpoint tiny] [--width 4] [--depth 1] [--noise 0.01] [--seed 0]
    [--dtype bfloat16] [--per-task 2]

Net2Net (Chen et al. 2016, arXiv 1511.05641) for Llama checkpoints. The model is laid out `width` times side by side:
hidden channels, query heads, key/value heads and MLP channels. The size of a head stays, and with it rope. RMS norm
makes of a repeated vector what it made of the single one. A matrix that reads repeated channels shares each weight out
among the copies, in parts that differ by the relative `noise`: no two copies have the same weights, and all compute
the same. Copies stand one behind the other, so query head h of copy c reads key/value head h // (heads / kv_heads) of
copy c, as the grouping of the larger model has it. The head is untied from the embedding: the embedding, read by all
copies, would give `width` times the logits.

A drafter's streams are laid out in the same way.

A `depth` above 1 puts depth - 1 layers of random weights behind each layer. Their output projections are `noise` times
the usual initialisation, so that they nearly pass on what they read.

Prints how close logits and likeliest tokens are to the small model's along held-out texts of the shipped tasks: before
the weights are rounded to `dtype`, and as saved. Both are computed in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hasten.methods.systems.streams import Streams
from hasten.model import load_model
from hasten.model.checkpoint import read_json, resolve
from hasten.model.tokenizer import load_tokenizer
from hasten.tasks import TASKS, examples

TEXT_SEED = 20_26
"""Of the held-out examples."""


def widen(small: LlamaForCausalLM, width: int, depth: int, noise: float) -> LlamaForCausalLM:
    """The larger model, float32; what is random comes from torch's global generator."""
    config = small.config
    repeated = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    changes = {name: width * getattr(config, name) for name in repeated} | {
        "num_hidden_layers": depth * config.num_hidden_layers,
        "head_dim": config.head_dim,
        "tie_word_embeddings": False,
    }
    large = LlamaForCausalLM(LlamaConfig(**config.to_dict() | changes))
    large.generation_config = small.generation_config
    with torch.no_grad():
        large.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight.repeat(1, width))
        fill(large.model.norm, small.model.norm, noise)
        fill(large.lm_head, small.lm_head, noise)
        for layer in large.model.layers:
            layer.self_attn.o_proj.weight *= noise
            layer.mlp.down_proj.weight *= noise
        for target, source in zip(large.model.layers[::depth], small.model.layers, strict=True):
            fill(target, source, noise)
    return large


def fill(target: nn.Module, source: nn.Module, noise: float) -> None:
    """Every norm, bias and matrix of `target`, from its namesake in `source`."""
    for name, parameter in target.named_parameters():
        weight = source.get_parameter(name)
        if weight.ndim == 1:
            parameter.copy_(weight.repeat(len(parameter) // len(weight)))
        else:
            parameter.copy_(share_out(weight, parameter.shape, noise))


def share_out(weight: Tensor, shape: Sequence[int], noise: float) -> Tensor:
    """A matrix [out, in] as one of `shape` [m * out, n * in]: along each row, the n parts of a weight sum to it."""
    (outs, ins), copies, parts = weight.shape, shape[0] // weight.shape[0], shape[1] // weight.shape[1]
    deviation = torch.randn(copies, outs, parts, ins)
    deviation -= deviation.mean(2, keepdim=True)
    return (weight[:, None] / parts * (1 + noise * deviation)).reshape(*shape)


@torch.inference_mode()
def compare(small: LlamaForCausalLM, large: LlamaForCausalLM, texts: list[tuple[list[int], int]]) -> str:
    """Differences of the logits and agreement of the likeliest token, at all positions and at those of the answers.

    Args:
        texts: token ids, and how many of them are the question's.
    """
    largest, total = 0.0, 0.0
    agreed, answered = [], []
    for ids, question in texts:
        expected, found = (model(torch.tensor([ids])).logits[0] for model in (small, large))
        difference = (expected - found).abs()
        largest, total = max(largest, difference.max().item()), total + difference.mean(1).sum().item()
        same = expected.argmax(1) == found.argmax(1)
        agreed += same.tolist()
        answered += same[question - 1 :].tolist()
    return (
        f"logits differ by {largest:.2g} at most, {total / len(agreed):.2g} on average; the likeliest token agrees at "
        f"{sum(agreed)} of {len(agreed)} positions, {sum(answered)} of {len(answered)} in answers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--per-task", type=int, default=2, help="texts of each task to compare on")
    options = parser.parse_args()
    if options.width < 1 or options.depth < 1 or options.per_task < 1:
        parser.error("--width, --depth and --per-task must be at least 1")
    source = resolve(options.checkpoint)
    if read_json(source / "config.json").get("model_type") != "llama":
        parser.error(f"{options.checkpoint} is not a Llama checkpoint")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(source)
    texts = []
    for task in TASKS:
        for example in examples(task, "test", options.per_task, TEXT_SEED):
            question, answer = (tokenizer(text)["input_ids"] for text in (example.prompt, example.answer))
            texts.append((question + answer, len(question)))

    small = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    large = widen(small, options.width, options.depth, options.noise)
    for name, model in ((options.checkpoint, small), (options.folder, large)):
        print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters in {name}")
    print(f"float32: {compare(small, large, texts)}", flush=True)
    large.to(getattr(torch, options.dtype)).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    if (streams := Streams.load(source, load_model(source, "float32"))) is not None:
        vectors = streams.vectors.repeat(1, options.width)
        Streams(vectors, options.depth * streams.layer).save(options.folder)
    saved = LlamaForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    print(f"saved as {options.dtype}: {compare(small, saved, texts)}")


if __name__ == "__main__":
    main()
