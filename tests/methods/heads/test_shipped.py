"""Heads that come with hasten, found by the model that they are for."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch

from hasten import LLM
from hasten.engine import Target
from hasten.methods.heads.files import save
from hasten.methods.heads.head import own_head
from hasten.model import Decoder, load_model
from hasten.model.fingerprint import fingerprint


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("hasten.methods.heads.shipped.ASSETS", tmp_path)
    return tmp_path


@pytest.fixture
def bare(llm: LLM, tmp_path: Path) -> Path:
    """The model's checkpoint without heads beside it."""
    folder = copytree(llm.folder, tmp_path / "bare")
    rmtree(folder / "heads")
    return folder


def test_a_fingerprint_is_of_the_model_not_of_how_it_is_stored(llm: LLM):
    one = fingerprint(llm.model)
    assert len(one) == 16
    for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"weights": "int4"}):
        assert fingerprint(LLM(str(llm.folder), **options).model) == one


def test_a_model_that_was_trained_further_has_another_one(llm: LLM):
    other = load_model(llm.folder, "float32")
    assert isinstance(other, Decoder)
    weight = other.layers[0].mlp_norm.weight
    other.layers[0].mlp_norm.weight = torch.where(torch.arange(len(weight)) == 1, weight * 1.25, weight)
    assert fingerprint(other) != fingerprint(llm.model)


def test_a_target_finds_its_head(llm: LLM, bare: Path, assets: Path):
    target = Target(llm.model, llm.tokenizer, str(bare))
    find = own_head("medusa")
    assert find(target) == {}
    save(assets / "heads" / "another" / "medusa", {"fingerprint": "0" * 16}, {})
    assert find(target) == {}
    own = assets / "heads" / "this" / "medusa"
    save(own, {"fingerprint": fingerprint(llm.model)}, {})
    assert find(target) == {"head": str(own)}
    assert own_head("hydra")(target) == {}


def test_heads_beside_the_checkpoint_go_first(llm: LLM, assets: Path):
    save(assets / "heads" / "this" / "medusa", {"fingerprint": fingerprint(llm.model)}, {})
    found = own_head("medusa")(Target(llm.model, llm.tokenizer, str(llm.folder)))
    assert found == {"head": str(Path(llm.folder) / "heads" / "medusa")}
