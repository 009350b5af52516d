"""Folders of EAGLE heads: what is saved is loaded, in every format, and what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_heads import random_head
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.errors import UserError
from hasten.methods.heads.eagle_format import EagleWeights, default_taps, layer_fields
from hasten.model.architectures.base import ARCHITECTURES
from hasten.model.config import ModelConfig
from hasten.model.weights import Piece

WORDS = torch.tensor([0, 2, 3, 11, 19])
Tensors, Config = dict[str, Tensor], dict[str, Any]


def llama(hidden: int) -> ModelConfig:
    return ARCHITECTURES["llama"].config(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 8,
            "vocab_size": 20,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_theta": 50_000.0,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def target() -> ModelConfig:
    return llama(8)


def same(one: EagleWeights, other: EagleWeights) -> None:
    mine, theirs = vars(one) | dict(one.layer), vars(other) | dict(other.layer)
    for name, value in mine.items():
        if isinstance(value, Piece):
            for part in ("weight", "bias"):
                mine_of_it, theirs_of_it = getattr(value, part), getattr(theirs[name], part)
                assert mine_of_it is theirs_of_it or torch.equal(mine_of_it, theirs_of_it), name
            assert [each.type for each in value.stored] == [each.type for each in theirs[name].stored]
        elif isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
        elif name not in ("layer", "config"):
            assert value == theirs[name], name
    assert one.layer.keys() == other.layer.keys()


@pytest.mark.parametrize("words", [None, WORDS])
@pytest.mark.parametrize(("version", "own", "normed"), [(1, False, False), (3, False, True), (3, True, False)])
def test_saved_loaded_and_saved_it_is_the_same_bytes(target, words, version, own, normed, tmp_path: Path) -> None:
    made = random_head(target, version, words, own=own, normed=normed)
    one, other = tmp_path / "one", tmp_path / "other"
    made.save(one, layer_fields(target))
    loaded = EagleWeights.load(one, target)
    same(made, loaded)
    assert loaded.config.inverse_frequencies == target.inverse_frequencies
    loaded.save(other, layer_fields(target))
    for name in ("config.json", "model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("store", ["q8_0", "q4_1"])
@pytest.mark.parametrize(("version", "own"), [(1, False), (3, True)])
def test_blocks_are_saved_and_loaded_as_they_are(store: str, version: int, own: bool, tmp_path: Path) -> None:
    target = llama(32)
    made = random_head(target, version, WORDS, own=own, store=store)
    made.save(tmp_path / "one", layer_fields(target))
    loaded = EagleWeights.load(tmp_path / "one", target)
    same(made, loaded)
    assert all(bool(piece.stored) == (len(piece.shape) == 2) for piece in (loaded.fusion, *loaded.layer.values()))
    assert loaded.head is None or loaded.head.stored
    loaded.save(tmp_path / "other", layer_fields(target))
    one, other = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[:, :-1], "k_proj.weight.q8_0 holds no whole blocks"),
        (lambda rows: torch.full_like(rows, 255), "k_proj.weight.q8_0 holds NaN"),
        (lambda rows: rows[:-1], r"k_proj.weight is \[15, 64\]"),
        (lambda rows: torch.cat([rows, rows], 1), r"k_proj.weight is \[16, 128\]"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(change: Callable[[Tensor], Tensor], told, tmp_path: Path) -> None:
    target, name = llama(32), "midlayer.self_attn.k_proj.weight"
    random_head(target, 3, store="q8_0").save(tmp_path / "head", layer_fields(target))
    rewritten(tmp_path / "head", put(f"{name}.q8_0", change), lambda each: each)
    with pytest.raises(UserError, match=told):
        EagleWeights.load(tmp_path / "head", target)
    rewritten(tmp_path / "head", put(name, lambda _: torch.ones(16, 64)), lambda each: each)
    rewritten(tmp_path / "head", put(f"{name}.q8_0", lambda rows: torch.zeros(16, 68).byte()), lambda each: each)
    with pytest.raises(UserError, match=r"k_proj\.weight more than once"):
        EagleWeights.load(tmp_path / "head", target)


def rewritten(folder: Path, tensors: Callable[[Tensors], Tensors], config: Callable[[Config], Config]) -> None:
    """Another folder in its place."""
    found = {name: each.clone() for name, each in load_file(folder / "model.safetensors").items()}
    save_file(tensors(found), folder / "model.safetensors")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(told)))


def test_speculators_format_is_read(target, tmp_path: Path) -> None:
    made = random_head(target, 3, WORDS, own=True)
    made.save(tmp_path / "head", layer_fields(target))

    def renamed(tensors: Tensors) -> Tensors:
        further = {"verifier_norm.weight": torch.ones(8)}
        return {name.replace("midlayer.", "layers.0."): each for name, each in tensors.items()} | further

    def nested(told: Config) -> Config:
        return {"speculators_model_type": "eagle3", "transformer_layer_config": {**told, "model_type": "llama"}}

    rewritten(tmp_path / "head", renamed, nested)
    same(made, EagleWeights.load(tmp_path / "head", target))


def test_a_rope_that_is_not_said_is_the_authors(target, tmp_path: Path) -> None:
    random_head(target, 1).save(tmp_path / "head", layer_fields(target))
    rewritten(tmp_path / "head", lambda each: each, lambda told: {k: v for k, v in told.items() if "rope" not in k})
    assert EagleWeights.load(tmp_path / "head", target).config.inverse_frequencies == pytest.approx((1.0, 0.01))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: each for key, each in tensors.items() if key != name}


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors.get(name, torch.zeros(1))).contiguous()}


BROKEN: list[tuple[Callable[[Tensors], Tensors], Config, str]] = [
    (without("midlayer.self_attn.k_proj.weight"), {}, "has no midlayer.self_attn.k_proj.weight"),
    (without("norm.weight"), {}, "has no norm.weight"),
    (put("fc_norm.0.weight", lambda _: torch.ones(8)), {}, "fc_norm.0.weight, which such heads do not have"),
    (put("midlayer.mlp.down_proj.weight", lambda each: each.T), {}, "midlayer.mlp.down_proj.weight is"),
    (put("norm.weight", lambda each: each * torch.nan), {}, "norm.weight holds NaN"),
    (put("d2t", lambda each: each + torch.arange(len(each))), {}, "d2t must be offsets"),
    (put("d2t", lambda each: each + 20), {}, "d2t must be offsets"),
    (put("d2t", lambda each: each.int()), {}, "d2t must be whole numbers"),
    (put("t2d", lambda each: ~each), {}, "t2d and d2t name other words"),
    (put("lm_head.weight", lambda _: torch.ones(20, 8)), {}, "lm_head.weight is"),
    (put("fc.weight", lambda each: each[:, :16]), {}, "must read 3 states of 8"),
    (lambda each: each, {"eagle_aux_hidden_state_layer_ids": [1, 4, 8]}, "must be layers of the target"),
    (lambda each: each, {"num_attention_heads": 1, "head_dim": 4}, "queries have 8 rows"),
    (lambda each: each, {"num_key_value_heads": 2}, "midlayer.self_attn.[kv]_proj.weight is"),
    (lambda each: each, {"norm_before_residual": 1}, "must be true or false"),
    (lambda each: each, {"hidden_act": "gelu"}, "only silu is"),
]


@pytest.mark.parametrize(("tensors", "config", "told"), BROKEN)
def test_what_does_not_fit_is_refused_by_name(target, tensors, config, told, tmp_path: Path) -> None:
    random_head(target, 3, WORDS).save(tmp_path / "head", layer_fields(target))
    rewritten(tmp_path / "head", tensors, lambda given: {**given, **config})
    with pytest.raises(UserError, match=told):
        EagleWeights.load(tmp_path / "head", target)


def test_a_head_for_another_target_is_refused(target, tmp_path: Path) -> None:
    random_head(target, 1).save(tmp_path / "head", layer_fields(target))
    with pytest.raises(UserError, match="8 wide, the target 12"):
        EagleWeights.load(tmp_path / "head", replace(target, hidden_size=12))
    with pytest.raises(UserError, match="no head in"):
        EagleWeights.load(tmp_path / "none", target)


def test_three_depths_of_any_target() -> None:
    assert default_taps(32) == (2, 16, 29) and default_taps(30) == (2, 15, 27)
    assert default_taps(1) == (0, 0, 0) and default_taps(4) == (1, 2, 2)
