"""The native step under the address and undefined-behaviour sanitizers, over shapes drawn at random.

Also over numbers that are none, or too large or too small: no integer may be made of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.model.native.library import LIBRARY

COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-DVECTOR_ROWS=7")
SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined,float-cast-overflow")

SCRIPT = """
import random, sys, torch
from pathlib import Path
from gguf_blocks import random_blocks
from instruction_sets import INSTRUCTION_SETS, chosen
from hasten.cache import Cache
from hasten.model import Rows, Span, Taps, load_model
from hasten.model.native.blocks import KINDS, BlockLinear
from hasten.model.native.drafting import Growth, Root, grow
from hasten.model.native.linear import BLOCK_FORMATS, FORMATS, PanelLinear

def linear_of(format, outputs):
    if format in FORMATS:
        return PanelLinear(torch.randn(outputs, random.randint(1, 200)), torch.randn(outputs), format)
    if format in ("Q8_0", "Q4_1") and random.random() < 0.5:
        weight = torch.randn(outputs, random.randint(1, 200)) * 0.01
        return BlockLinear.rounded(format, weight, torch.randn(outputs), torch.float32)
    inputs = KINDS[format].inputs * random.randint(1, 3)
    blocks = random_blocks(format, outputs, inputs, seed=outputs, scale=1e-4)
    return BlockLinear(format, blocks, inputs, torch.randn(outputs), torch.float32)

def examine(folders):
    for number in range(90):
        outputs, rows = random.randint(1, 90), random.randint(1, 70)
        linear = linear_of((*FORMATS, *BLOCK_FORMATS)[number % 7], outputs)
        inputs = linear.in_features
        x = torch.randn(rows, inputs)
        assert torch.allclose(linear.forward(x), x @ linear.dequant().T + linear.bias, atol=1.0, rtol=0.1)
        x.view(-1)[torch.randint(x.numel(), (3,))] = torch.tensor(random.choices(EXTREME, k=3))
        linear.forward(x)
        linear.forward(torch.full((rows, inputs), random.choice(EXTREME)))
    for folder in folders:
        for weights, dtype in (("dense", "float32"), ("dense", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16")):
            model = load_model(folder, dtype, "cpu", "native", weights)
            cache = Cache(model.config.layers, model.cache_dtype, model.device)
            for _ in range(6):
                step(model, cache)
                grow_trees(model, cache, 1.0)
            extreme = random.choice(EXTREME)
            model.embedding[3] = extreme
            step(model, cache, sound=False)
            grow_trees(model, cache, extreme)

EXTREME = (torch.nan, torch.inf, -torch.inf, 1e38, -3e38, 1e20, 1e-38, 1e-45)

def grow_trees(model, cache, scale):
    roots, width = [], random.randint(1, 5)
    for _ in range(random.randint(1, 3)):
        sequence, length = cache.sequence(), random.choice([0, 1, 15, 16, 17, 63, 64, 65, 130])
        if length:
            model.forward(Rows.of(sequence, [5] * length, 0), [0])
            sequence.commit(length)
        state, sizes = scale * torch.randn(model.config.hidden_size), (random.randint(1, 20), random.randint(1, 6))
        roots.append(Root(sequence, state, length - 1, *sizes, random.sample(range(90), 2)))
    norm, words = torch.ones(model.config.hidden_size), torch.arange(model.config.vocab_size).flip(0)
    norm, words, least = random.choice([norm, None]), random.choice([words, None]), random.choice([0, 0.1])
    growth = Growth(None, norm, words, width, width, least)
    for root, tree in zip(roots, grow(model, growth, roots), strict=True):
        assert len(tree.tokens) <= root.nodes and all(parent < node for node, parent in enumerate(tree.parents))

def step(model, cache, sound=True):
    spans, tokens, positions, start, family = [], [], [], 0, []
    for _ in range(random.randint(1, 6)):
        # Forks of what came before, perhaps cropped: these share tiles.
        sequence = random.choice(family).fork() if family and random.random() < 0.5 else cache.sequence()
        if random.random() < 0.3:
            sequence.crop(random.randint(0, sequence.length))
        length = random.choice([0, 1, 15, 16, 17, 63, 64, 65, 130])
        if length:
            model.forward(Rows.of(sequence, [3] * length, sequence.length), [0])
            sequence.commit(length)
            if random.random() < 0.3:
                sequence = sequence.fork()
        family.append(sequence)
        length = sequence.length
        count = random.choice([1, 2, 7, 16, 33])
        mask = None
        if random.random() < 0.5:
            mask = (torch.rand(count, count) < 0.5).tril().fill_diagonal_(True)
        spans.append(Span(sequence, start, start + count, mask))
        tokens += [random.randrange(model.config.vocab_size) for _ in range(count)]
        positions += range(length, length + count)
        start += count
    taps = Taps([("input", 1), ("attention_output", 0), ("mlp_input", 1), ("output", 2), ("final_norm", 0)])
    wanted = random.sample(range(start), random.randint(1, start))
    rows = Rows(torch.tensor(tokens), torch.tensor(positions), spans)
    logits = model.forward(rows, wanted, taps if random.random() < 0.5 else None)
    assert logits.shape[0] == len(wanted) and (logits.isfinite().all() or not sound)

torch.set_num_threads(2)
torch.manual_seed(0)
for seed, name in enumerate(INSTRUCTION_SETS):
    with chosen(name, Path(sys.argv[1]), Path(sys.argv[1]).parent) as available:
        if available:
            print("examining", name, file=sys.stderr)
            random.seed(seed)
            examine(sys.argv[2:])
            print(name)
"""


def test_no_address_is_wrong(tmp_path: Path, make_checkpoint: Callable[..., Any]) -> None:
    """In every instruction set that this machine has: one library, with fewer of their alike kernels."""
    if COMPILER is None or not LIBRARY.exists() or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    target, source = tmp_path / "step.so", LIBRARY.with_name("step.cpp")
    built = subprocess.run(
        [COMPILER, *FLAGS, *SANITIZERS, str(source), "-ldl", "-o", str(target)], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"cannot build with sanitizers: {built.stderr[-200:]}")
    runtime = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    folders = [
        make_checkpoint("llama", intermediate_size=80).folder,
        make_checkpoint("qwen3").folder,
        make_checkpoint("mistral", sliding_window=7).folder,
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", SCRIPT, str(target), *map(str, folders)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "portable" in ran.stdout.split()
