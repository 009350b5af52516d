"""The native code on arm64, emulated: each instruction set of NEON gives what AVX2 gives here.

Products in all formats and draws are the same bits. A whole pass differs in the last bits, as compilers order the
operations of ropes and of weights of attention in ways of their own, and sines come from another library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_int64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_blocks import random_blocks
from instruction_sets import chosen
from numpy.typing import NDArray
from torch import Tensor
from written_calls import Calls

from hasten import SamplingParams
from hasten.engine.sampling.native import library as sampling
from hasten.engine.sampling.rule import Rule
from hasten.model import Decoder, load_model
from hasten.model.native import library
from hasten.model.native.blocks import BlockLinear
from hasten.model.native.library import LIBRARY
from hasten.model.native.linear import BLOCK_FORMATS, FORMATS, PanelLinear, Panels
from hasten.model.native.structs import BatchStruct, SlotsStruct, SpanStruct, ViewStruct

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
NEEDED = "needs g++-aarch64-linux-gnu and qemu-user-static"
PROGRAM = Path(__file__).with_name("native_calls.cpp")
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-pthread", "-Wno-psabi", "-static")
ROWS = (1, 2, 3, 4, 5, 9, 33)
CAPACITY = 64

PROCESSORS = {
    "neon": ("cortex-a72", None),
    "neondot": ("neoverse-n1", None),
    "neonbf16": ("max", None),
    "portable": ("max", "portable"),
}
"""Instruction sets, with a processor that chooses each, or what is asked for."""

Numbers = Tensor | NDArray[Any]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes calls on arm64."""
    if COMPILER is None or EMULATOR is None:
        pytest.skip(NEEDED)
    target = tmp_path_factory.mktemp("arm64") / "calls"
    sample, step = sampling.LIBRARY.with_name("sample.cpp"), LIBRARY.with_name("step.cpp")
    for command in (
        [*FLAGS, "-ffp-contract=off", "-c", str(sample), "-o", f"{target}.o"],
        [*FLAGS, f'-DSTEP="{step}"', str(PROGRAM), f"{target}.o", "-o", str(target)],
    ):
        built = subprocess.run([COMPILER, *command], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-3000:]
    return target


class Written:
    """Calls, and what they give here.

    Attributes:
        results: by what they are of.
        memory: before the calls, and these themselves.
    """

    def __init__(self) -> None:
        self.calls, self.results = Calls(), dict[str, Numbers]()
        self.memory = b""

    def result(self, name: str, part: Numbers) -> int:
        self.results[name] = part
        return self.calls.add(part)

    def layer(self, name: str, linear: Panels, x: Tensor) -> None:
        rows = x.shape[0]
        out = torch.zeros(rows, linear.out_features)
        weight, residual = self.weight(linear), self.calls.add(torch.randn_like(out))
        self.calls.call("hasten_linear", weight, rows, self.calls.add(x), residual, self.result(name, out))

    def layers(self, name: str, x: Tensor) -> None:
        """In every format, rows of 512 inputs."""
        for format in FORMATS:
            # The last word of bf16 and the last group are not whole.
            linear = PanelLinear(torch.randn(70, 507), torch.randn(70), format)
            self.layer(f"{name} in {format}", linear, x[:, :507].contiguous())
        for kind in BLOCK_FORMATS:
            blocks = random_blocks(kind, 70, 512)
            self.layer(f"{name} in {kind}", BlockLinear(kind, blocks, 512, torch.randn(70), torch.float32), x)
        turned = BlockLinear.rounded("Q8_0", torch.randn(70, 512), None, torch.float32)
        self.layer(f"{name} in turned blocks", turned, x)

    def weight(self, linear: Panels) -> int:
        for part in (linear.panels, linear.scales, linear.bias):
            if part is not None:
                self.calls.add(part)
        return self.calls.add(linear.struct)

    def model(self, name: str, model: Decoder) -> None:
        """A prompt, a tree behind it, and a chain behind both."""
        described = model.backend.describe(model)  # type: ignore[attr-defined]
        for part in (described, model.embedding, *(each for each in described.kept if each is not None)):
            self.calls.add(part)
        for piece in (model.head, *(piece for layer in model.layers for piece in matrices(layer))):
            self.weight(piece)
        layers, heads = described.layers, described.kv_heads
        keys, values = (torch.zeros(layers, heads, CAPACITY, described.head_dim) for _ in range(2))
        for part in (keys, values):
            self.calls.add(part)
        slots = torch.arange(CAPACITY)
        tree = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]])

        def span(length: int, rows: int, mask: Tensor | None) -> Any:
            parts = [slots, torch.zeros(layers, dtype=torch.int64), torch.arange(layers)]
            positions, group_of, index_of = map(self.calls.add, parts)
            view = ViewStruct(
                keys=keys.data_ptr(), values=values.data_ptr(), positions=positions, capacity=CAPACITY, length=length
            )
            views = SlotsStruct(views=1, view=self.calls.add(view))
            seen = None if mask is None else self.calls.add(mask)
            made = SpanStruct(start=0, stop=rows, pending=rows, mask=seen, slots=self.calls.add(views))
            made.group_of, made.index_of = group_of, index_of
            return made

        for length, positions, mask in ((0, range(21), None), (21, (21, 22, 22, 23, 23), tree.to(torch.uint8))):
            rows = len(positions)
            tokens, places = torch.arange(3, 3 + rows), torch.tensor(positions)
            batch = BatchStruct(rows=rows, tokens=self.calls.add(tokens), positions=self.calls.add(places), axes=1)
            batch.spans, batch.span = 1, self.calls.add(span(length, rows, mask))
            batch.wanted, batch.row_wanted = rows, self.calls.add((c_int64 * rows)(*range(rows)))
            batch.logits = self.result(f"{rows} logits of {name}", torch.zeros(rows, described.vocabulary))
            self.calls.call("hasten_forward", self.calls.add(described), self.calls.add(batch))
        drafted, probabilities = torch.zeros(6, dtype=torch.int64), torch.zeros(6)
        places = self.result(f"tokens of {name}", drafted), self.result(f"chances of {name}", probabilities)
        asked = 5, 26, described.vocabulary, 6
        self.calls.call("hasten_chain", self.calls.add(described), self.calls.add(span(26, 1, None)), *asked, *places)

    def walks(self, vocabulary: int) -> None:
        """Draws of every kind, each from a row of its own."""
        kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1e-6}, {"temperature": 0.8}]
        kinds += [{"top_k": 30}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}]
        kinds += [{"repetition_penalty": 1.3, "frequency_penalty": 0.2}, {"logit_bias": {3: 4.0}}]
        rules = [Rule(SamplingParams(seed=7, **kind), 0, range(20), vocabulary) for kind in kinds for _ in range(8)]
        table = np.zeros(len(rules), sampling.WALK)
        logits = torch.randn(len(rules), vocabulary) * 3
        for number, rule in enumerate(rules):
            for part in (rule._struct, rule.bias_tokens, rule.bias_values, rule.seen, rule.counts):
                if part is not None:
                    self.calls.add(part)
            table[number]["rule"], table[number]["position"] = rule.address, number
            table[number]["logits"] = self.calls.add(logits) + logits[number].nbytes * number
        scratch = [torch.zeros(size) for size in (-(-vocabulary // 256), vocabulary, 2 * vocabulary)]
        places = [*map(self.calls.add, scratch)]
        self.calls.call("hasten_sample", self.result("draws", table), len(table), vocabulary, *places)


def matrices(layer: Any) -> list[Panels]:
    return [layer.mixer.qkv, layer.mixer.out, layer.mlp.gate_up, layer.mlp.down]


@pytest.fixture(scope="module")
def written(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Written:
    made = Written()
    torch.manual_seed(0)
    with chosen("avx2", LIBRARY, tmp_path_factory.mktemp("avx2")) as available:
        loaded, sampler = library.library() if available else None, sampling.library()
        if loaded is None or sampler is None:
            pytest.skip("arm64 is compared with AVX2, which is not here")
        for rows in ROWS:
            made.layers(f"{rows} rows", torch.randn(rows, 512) * torch.logspace(-3, 3, rows).unsqueeze(1))
        spoilt = torch.randn(5, 512)
        spoilt[0, 3], spoilt[2, 500], spoilt[4, 40] = torch.nan, torch.inf, 3e38
        made.layers("spoilt rows", spoilt)
        for byte in (0, 255):
            blocks = random_blocks("Q8_0", 70, 512).view(70, 16, 34)
            blocks[..., 2:] = byte
            largest = BlockLinear("Q8_0", blocks.flatten(1), 512, None, torch.float32)
            made.layer(f"largest codes, {byte}", largest, torch.tensor([[1.0], [-1.0]]).expand(2, 512).contiguous())
        for weights, dtype in (("dense", "float32"), ("dense", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16")):
            folder = make_checkpoint("qwen3", intermediate_size=80).folder
            made.model(f"{weights} {dtype}", load_model(folder, dtype, "cpu", "native", weights))
        made.walks(1000)
        made.memory = made.calls.written()
        made.calls.make(loaded, sampler, library.team())
    return made


@pytest.fixture(scope="module", params=PROCESSORS)
def emulated(request: pytest.FixtureRequest, program: Path, written: Written) -> dict[str, NDArray[Any]]:
    """The results as a processor of arm64 gives them."""
    processor, wanted = PROCESSORS[request.param]
    environment = os.environ | ({} if wanted is None else {"HASTEN_NATIVE": wanted})
    command = [str(EMULATOR), "-cpu", processor, str(program)]
    ran = subprocess.run(command, input=written.memory, env=environment, capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    chosen, memory = ran.stdout.split(b"\n", 1)
    assert chosen.decode() == request.param
    parts = written.calls.parts_of(memory)
    return {what: parts[written.calls.add(here)].view(as_array(here).dtype) for what, here in written.results.items()}


def as_array(numbers: Numbers) -> NDArray[Any]:
    return numbers.numpy().ravel() if isinstance(numbers, Tensor) else numbers


def test_products_and_draws_are_the_same_bits(written: Written, emulated: dict[str, NDArray[Any]]) -> None:
    products = [what for what in emulated if " rows in " in what or what.startswith("largest codes")]
    assert len(products) == (len(ROWS) + 1) * (len(FORMATS) + len(BLOCK_FORMATS) + 1) + 2
    for what in products:
        here, there = as_array(written.results[what]), emulated[what]
        # What is no number has a sign that nobody asks for.
        number = ~np.isnan(here)
        assert np.array_equal(number, ~np.isnan(there)), what
        assert np.any(here[number]) and here[number].tobytes() == there[number].tobytes(), what
    spoilt = emulated["spoilt rows in Q4_1"].reshape(5, 70)
    assert np.isnan(spoilt[[0, 2]]).all() and np.isfinite(spoilt[[1, 3]]).all()
    drawn = as_array(written.results["draws"])["token"]
    assert len(set(drawn.tolist())) > 9 and np.array_equal(drawn, emulated["draws"]["token"])


def test_passes_are_close(written: Written, emulated: dict[str, NDArray[Any]]) -> None:
    for what, there in emulated.items():
        here = as_array(written.results[what])
        if what.startswith("tokens of "):
            assert np.array_equal(here, there), what
        elif " of " in what:
            # A rounded input may be the next one.
            np.testing.assert_allclose(there, here, rtol=0, atol=1e-3 * np.abs(here).max(), err_msg=what)
