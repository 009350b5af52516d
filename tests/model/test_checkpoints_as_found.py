"""Checkpoints as users have them: what transformers takes is taken, what is wrong is told in one sentence, at once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hasten.cache import Cache
from hasten.errors import UserError
from hasten.model import Decoder, Rows, load_model
from hasten.model.loading import read_config
from hasten.model.tokenizer import load_tokenizer

Make = Callable[..., Any]
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]


def logits(model: Decoder, tokens: list[int]) -> Tensor:
    return model.forward(Rows.of(Cache(model.config.layers, model.cache_dtype, model.device).sequence(), tokens, 0))


def same_as_transformers(folder: Path, length: int = 40) -> None:
    """Both load it, and give the same logits."""
    tokens = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    got = logits(load_model(folder, dtype="float32", device="cpu"), tokens)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def copied(make_checkpoint: Make, tmp_path: Path) -> Callable[..., Path]:
    def copy(architecture: str, **fields: Any) -> Path:
        return shutil.copytree(make_checkpoint(architecture, **fields).folder, tmp_path / "checkpoint")

    return copy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tensors_by_other_names(architecture: str, bare: bool, stored: str, copied: Callable[..., Path]) -> None:
    """What is tied is stored once, as the one or the other; a part of the model is saved without its prefix."""
    folder = copied(architecture, tie_word_embeddings=stored != "both")
    tensors = load_file(folder / "model.safetensors")
    if stored == "head":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    if bare:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    same_as_transformers(folder)


# Ropes

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 9.0]}
ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 512),
    "longrope": ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 128}, 128),
    "longrope with a factor": (
        {"rope_type": "longrope", **FACTORS, "factor": 8.0, "original_max_position_embeddings": 64},
        64,
    ),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 2048),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    "stretched yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
}


@pytest.mark.parametrize("name", ROPES)
def test_ropes_up_to_the_end_of_the_context(name: str, copied: Callable[..., Path]) -> None:
    rope, limit = ROPES[name]
    folder = copied("llama", rope_parameters={"rope_theta": 10_000.0, **rope})
    assert load_model(folder, device="cpu").config.max_positions == limit
    for length in (9, min(limit, 700)):
        same_as_transformers(folder, length)


# What is wrong


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", True),
        ("sliding_window", "7"),
        ("num_hidden_layers", True),
        ("tie_word_embeddings", "no"),
        ("attention_bias", []),
        ("use_sliding_window", 1),
        ("layer_types", "full"),
        ("layer_types", 3),
        ("rope_parameters", [1]),
        ("rope_scaling", "yarn"),
        ("hidden_act", 3),
    ],
)
def test_fields_of_another_type(architecture: str, field: str, value: Any, copied: Callable[..., Path]) -> None:
    folder = copied(architecture)
    slides = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    edit(folder / "config.json", **(slides if field == "sliding_window" else {}), **{field: value})
    if architecture == "llama" and field in ("sliding_window", "layer_types"):
        # It has none.
        load_model(folder, device="cpu")
        return
    with pytest.raises(UserError, match=rf"{field}|rope|activation|layer_types"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "field",
    ["num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size"],
)
def test_a_billion_is_answered_at_once(
    architecture: str, backend: str, field: str, copied: Callable[..., Path]
) -> None:
    folder = copied(architecture)
    edit(folder / "config.json", **{"layer_types": None, field: 10**9})
    started = time.monotonic()
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(folder, device="cpu", backend=backend)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("spoil", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"],
)
def test_what_never_ends_is_not_read(spoil: Callable[[Path], object], name: str, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    (folder / name).unlink(missing_ok=True)
    spoil(folder / name)
    with pytest.raises(UserError, match=rf"{name}: it is no file"):
        load_tokenizer(folder)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TEXTS = {
    "null": "null",
    "a list": "[1]",
    "a number": "5",
    "nothing": "",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep lists": "[" * 100_000 + "]" * 100_000,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_files_that_hold_something_else(name: str, text: str, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    (folder / name).write_text(TEXTS[text])
    with pytest.raises(UserError) as caught:
        read_config(folder)
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert 10 < len(str(caught.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**10) | st.floats() | st.text(max_size=3) | st.just("Unheard"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "id", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def spoilt(value: Any, picks: list[int], other: Any) -> Any:
    """A JSON document in which one place, somewhere inside, holds something else."""
    if not picks or not isinstance(value, dict | list) or not value:
        return other
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[picks[0] % len(keys)]
    changed = value.copy()
    changed[key] = spoilt(value[key], picks[1:], other)
    return changed


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.integers(0, 50), min_size=1, max_size=4), other=JSON)
def test_any_other_value_anywhere(name: str, picks: list[int], other: Any, tiny: Path, tmp_path: Path) -> None:
    """It is loaded, or refused in one sentence."""
    folder = shutil.copytree(tiny, tmp_path / "checkpoint", dirs_exist_ok=True)
    (folder / name).write_text(json.dumps(spoilt(json.loads((tiny / name).read_text()), picks, other)))
    try:
        load_model(folder, device="cpu")
        load_tokenizer(folder)
    except UserError as error:
        assert "\n" not in str(error)
