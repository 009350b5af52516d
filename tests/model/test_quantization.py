"""What a configuration says of quantised weights is understood, and refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import UserError
from hasten.model import load_model
from hasten.model.quantization import Quantization, read_quantization

PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            "input_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*router"],
}
CASES: dict[str, tuple[dict[str, Any], Quantization, str]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
        Quantization("gptq", 4, "128"),
        "gptq, 4 bits in groups of 128",
    ),
    "gptq-rows": ({"quant_method": "gptq", "bits": 3, "group_size": -1}, Quantization("gptq", 3), "gptq, 3 bits"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["lm_head"], "version": "gemm"},
        Quantization("awq", 4, "64", ("lm_head",)),
        "awq, 4 bits in groups of 64, all but lm_head",
    ),
    "awq-older": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "modules_to_not_convert": None},
        Quantization("awq", 4, "128"),
        "awq, 4 bits in groups of 128",
    ),
    "compressed": (
        PACKED,
        Quantization("compressed-tensors", 4, "32", ("lm_head", "re:.*router")),
        "compressed-tensors, 4 bits in groups of 32, all but lm_head and 1 more",
    ),
    "bitsandbytes": (
        {"load_in_4bit": True, "load_in_8bit": False, "llm_int8_skip_modules": ["lm_head"]},
        Quantization("bitsandbytes", 4, None, ("lm_head",)),
        "bitsandbytes, 4 bits, all but lm_head",
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        Quantization("fp8", None, "[128, 128]"),
        "fp8 in groups of [128, 128]",
    ),
    "unnamed": ({"bits": 2}, Quantization("a method without a name", 2), "a method without a name, 2 bits"),
    "strange": (
        {"quant_method": "gptq", "bits": "four", "config_groups": [1], "ignore": "lm_head"},
        Quantization("gptq"),
        "gptq",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_says(name: str) -> None:
    section, understood, sentence = CASES[name]
    assert read_quantization(section) == understood
    assert str(understood) == sentence


@pytest.mark.parametrize(
    "section", [None, {}, {"quant_method": "none"}, {"quant_method": None, "load_in_4bit": False}, {"sparsity": {}}]
)
def test_what_says_nothing(section: Any) -> None:
    assert read_quantization(section) is None


def edited(folder: Path, into: Path, section: Any) -> Path:
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return into


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(name: str, make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    section, _, sentence = CASES[name]
    folder = edited(make_checkpoint("llama").folder, tmp_path / "checkpoint", section)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert f"is quantised ({sentence}): not supported yet" in str(caught.value)


def test_nothing_is_no_reason_to_refuse(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    folder = edited(make_checkpoint("llama").folder, tmp_path / "none", {"quant_method": "none"})
    assert len(load_model(folder, device="cpu").layers) == 3
    with pytest.raises(UserError, match="quantization_config"):
        load_model(edited(folder, tmp_path / "strange", "gptq"))
