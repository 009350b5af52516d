"""Configurations are read as transformers reads them, whatever they leave out and however old their layout is."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from hasten.catalogue.entries import ASSETS, shipped
from hasten.errors import UserError
from hasten.model.architectures import ARCHITECTURES
from hasten.model.loading import read_config
from hasten.model.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "sizes alone": {},
    "nulls": {"num_key_value_heads": None, "rope_scaling": None, "rope_parameters": None},
    "own sizes": {"head_dim": 16, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5},
    "tied": {"tie_word_embeddings": True, "attention_bias": True, "eos_token_id": [5, 6]},
    "theta": {"rope_theta": 5e5},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 5e5},
    "old linear rope": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "old llama3 rope": {"head_dim": 16, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3 rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "yarn rope": {"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "old yarn rope": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "trained length beside the rope": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    },
    "window": {"sliding_window": 32},
    "no window": {"sliding_window": None},
    "upper windows": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    "switched off": {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2},
    "types": {
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
OTHERWISE = {("mistral", "nulls"), ("mistral", "types")}
"""transformers refuses the first, and takes the second for the architecture `ministral`."""


@pytest.mark.parametrize(
    ("architecture", "name"),
    [pair for pair in product(["llama", "mistral", "qwen2", "qwen3"], VARIANTS) if pair not in OTHERWISE],
)
def test_as_transformers(architecture: str, name: str, tmp_path: Path) -> None:
    raw = {"model_type": architecture, **SIZES, **VARIANTS[name]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    # As its rope formulas do before they read.
    theirs.standardize_rope_params()
    reader = ARCHITECTURES[architecture]
    ours = reader.read(reader.fields(raw))
    assert ours == reader.read(theirs)
    for field in ("eos_token_id", "attention_bias", "mlp_bias"):
        assert ours.source.get(field) == (getattr(theirs, field, None) or ours.source.get(field))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    theirs = AutoConfig.for_model(architecture)
    for name, value in ARCHITECTURES[architecture].defaults.items():
        assert getattr(theirs, name) == value or (name == "sliding_window" and not theirs.use_sliding_window)


@pytest.mark.parametrize("field", SIZES)
def test_sizes_have_no_defaults(field: str) -> None:
    llama = ARCHITECTURES["llama"]
    fields = llama.fields({name: size for name, size in SIZES.items() if name != field} | {"model_type": "llama"})
    with pytest.raises(UserError, match=field):
        llama.read(fields)


def test_a_rope_per_type_of_layer_is_refused() -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UserError, match="per type of layer"):
        ARCHITECTURES["qwen3"].fields({**SIZES, "rope_parameters": rope})


@pytest.mark.parametrize("name", shipped())
def test_the_tokenizer_is_the_one_that_transformers_chooses(name: str) -> None:
    ours, theirs = load_tokenizer(name).complete, AutoTokenizer.from_pretrained(ASSETS / name)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map


NUMBERS = [
    ({}, "rms_norm_eps"),
    ({}, "rope_theta"),
    ({"rope_theta": 1e4}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    *(({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, name) for name in LLAMA3),
    *(
        ({"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, name)
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    ),
]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "-1", "-1e-300", "1e39", "0"])
@pytest.mark.parametrize(("fields", "name"), NUMBERS, ids=lambda part: part if isinstance(part, str) else None)
def test_constants_that_are_no_numbers(fields: dict[str, Any], name: str, value: str, tmp_path: Path) -> None:
    if value == "0" and name in ("rms_norm_eps", "mscale", "mscale_all_dim"):
        pytest.skip("may be 0")
    raw = json.loads(json.dumps({"model_type": "llama", **SIZES, **fields}))
    place = raw.get("rope_parameters", raw)
    place[name] = json.loads(value)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    wanted = f"config.json has {name} {json.loads(value)}, which must be a finite number "
    assert str(caught.value).startswith(wanted), caught.value


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
def test_numbers_that_may_be_zero(name: str) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, name: 0}
    llama = ARCHITECTURES["llama"]
    read = llama.config({"model_type": "llama", **SIZES, "head_dim": 16, "rms_norm_eps": 0, "rope_parameters": yarn})
    assert read.norm_eps == 0
    assert 0 < read.rope_factor < 2


@pytest.mark.parametrize("first", [float("nan"), "2", 1.5])
def test_the_first_layer_with_a_window_is_a_whole_number(first: Any) -> None:
    raw = {"model_type": "qwen2", **SIZES, **VARIANTS["upper windows"], "max_window_layers": first}
    with pytest.raises(UserError, match=f"max_window_layers {first}, which must be a whole number"):
        ARCHITECTURES["qwen2"].config(raw)
