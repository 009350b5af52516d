"""Products in tile registers, emulated where the processor has none: the same bits as by vectors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_blocks import random_blocks
from instruction_sets import chosen

from hasten.model.native.blocks import KINDS, BlockLinear
from hasten.model.native.library import LIBRARY
from hasten.model.native.linear import BLOCK_FORMATS, PanelLinear

COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-DVECTOR_ROWS=12", "-DEMULATED_TILES")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native step with tiles in plain C++."""
    if COMPILER is None or not LIBRARY.exists() or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    target = tmp_path_factory.mktemp("emulated") / "step.so"
    command = [COMPILER, *FLAGS, str(LIBRARY.with_name("step.cpp")), "-ldl", "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return target


def test_groups_have_the_bits_that_vectors_give_them(emulated: Path, tmp_path: Path) -> None:
    x = torch.randn(70, 768, generator=torch.Generator().manual_seed(0))
    results = {}
    for name in ("avx512bf16", "amx"):
        with chosen(name, emulated, tmp_path) as available:
            if not available:
                pytest.skip("needs AVX-512 with VNNI and BF16")
            for format in BLOCK_FORMATS:
                linear = BlockLinear(format, random_blocks(format, 90, 768), 768, None, torch.float32)
                assert 768 % KINDS[format].inputs == 0
                results[name, format] = [linear.forward(x[:rows]) for rows in (1, 7, 8, 9, 12, 16, 17, 31, 32, 33, 70)]
    for format in BLOCK_FORMATS:
        for vectors, tiles in zip(results["avx512bf16", format], results["amx", format], strict=True):
            assert torch.equal(vectors, tiles), format


def test_bf16_rows_are_the_same_bits_beside_any_others(emulated: Path, tmp_path: Path) -> None:
    weight, x = torch.randn(70, 190), torch.randn(50, 190)
    with chosen("amx", emulated, tmp_path) as available:
        if not available:
            pytest.skip("needs AVX-512 with VNNI and BF16")
        linear = PanelLinear(weight, None, "bfloat16")
        whole = linear.forward(x)
        torch.testing.assert_close(whole, x.bfloat16().float() @ weight.bfloat16().float().T, atol=1e-3, rtol=1e-4)
        for rows in (1, 9, 16, 17, 33):
            assert torch.equal(linear.forward(x[:rows]), whole[:rows])
