"""Chimera: what it drafts, against a computation of every node anew; its files, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from chimera_reference import ChimeraReference
from hasten import LLM, SamplingParams
from hasten.engine import Draft, Observation, Target
from hasten.engine.creation import create
from hasten.errors import UserError
from hasten.methods.heads.chimera import Chimera
from hasten.methods.heads.chimera_model import trigram
from hasten.methods.heads.chimera_weights import AUTHORS, ChimeraWeights
from hasten.methods.heads.pieces import rounded
from hasten.model.weights import Piece
from helpers import save_chimera

Make = Callable[[str], Chimera]
PROMPT = [5, 17, 40, 5, 17]
HIDDEN, VOCABULARY, HEAD_DIM = 48, 150, 12


@pytest.fixture
def make_drafter(llm: LLM) -> Make:
    """A drafter of its own for the shared model."""

    def make(spec: str) -> Chimera:
        drafter = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
        assert isinstance(drafter, Chimera)
        return drafter

    return make


def shown(llm: LLM, drafter: Chimera, prompts: list[list[int]]) -> list[tuple[list[int], Draft]]:
    """Before each verification the committed tokens, and the draft."""
    seen = []
    observe = drafter.observe

    def told(request: Any, observation: Observation) -> None:
        seen.append((request.tokens[: -len(observation.tokens)], observation.draft))
        observe(request, observation)

    drafter.observe = told  # type: ignore[method-assign, assignment]
    llm.generate(prompts, SamplingParams(max_tokens=10, ignore_eos=True), drafter)
    return seen


WORDS = torch.arange(3, VOCABULARY, 2)


@pytest.mark.parametrize("words, wide", [(None, False), (WORDS, False), (None, True), (WORDS, True)])
def test_each_node_is_what_a_computation_of_its_own_says(
    llm: LLM, make_drafter: Make, tmp_path: Path, words: Tensor | None, wide: bool
) -> None:
    """Its estimate is the product of its path's; texts of two tokens, and of a batch, included."""
    model = LlamaForCausalLM.from_pretrained(llm.folder)
    reference = ChimeraReference(model, save_chimera(tmp_path, model, words, wide))
    drafter = make_drafter(f"chimera:nodes=12,least=0,ranks=4,sized=false,head={tmp_path}")
    deepest = checked = 0
    for committed, draft in shown(llm, drafter, [PROMPT, [9], list(range(2, 40))])[::3]:
        for node, token in enumerate(draft.tokens):
            path = draft.path(node)
            chance = 1.0
            for said, step in zip(reference.logits(committed, [draft.tokens[n] for n in path[:-1]]), path, strict=True):
                row = draft.tokens[step] if words is None else words.tolist().index(draft.tokens[step])
                chance *= float(said.softmax(-1)[row])
            assert draft.estimates[node] == pytest.approx(chance, rel=1e-3), token
            deepest, checked = max(deepest, len(path)), checked + 1
    assert deepest == 3 and checked > 40


def test_a_static_tree_has_the_measured_rates(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("chimera:tree=static,nodes=4,sized=false")
    drafts = [draft for _, draft in shown(llm, drafter, [PROMPT]) if len(draft) == 4]
    assert drafts and all(draft.estimates == pytest.approx([0.6, 0.24, 0.2, 0.12]) for draft in drafts)


def test_what_is_unlikely_has_no_children(llm: LLM, make_drafter: Make) -> None:
    drafts = [draft for _, draft in shown(llm, make_drafter("chimera:least=1,sized=false"), [PROMPT])]
    assert drafts and all(max(draft.depths(), default=1) == 1 for draft in drafts)


def test_its_drafts_save_passes(llm: LLM, make_drafter: Make) -> None:
    """The weights of the tests are near the target: a chain of nothing would be one token per step."""
    (made,) = llm.generate(
        [PROMPT], SamplingParams(max_tokens=40, ignore_eos=True), make_drafter("chimera:sized=false")
    )
    assert made.choices[0].tokens_per_step > 1.1


def test_a_text_begins_with_its_second_token_twice() -> None:
    assert trigram([4, 7]) == [4, 7, 7]
    assert trigram([4, 7, 9]) == [4, 7, 9]
    assert trigram([1, 4, 7, 9]) == [4, 7, 9]


def test_memory_is_that_of_the_weights_and_goes_with_requests(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("chimera")
    weights, most = drafter.memory_bytes, []
    observe = drafter.observe

    def told(request: Any, observation: Observation) -> None:
        observe(request, observation)
        most.append(drafter.memory_bytes)

    drafter.observe = told  # type: ignore[method-assign, assignment]
    llm.generate([PROMPT] * 3, SamplingParams(max_tokens=8), drafter)
    assert 0 < weights < max(most)
    assert drafter.memory_bytes == weights


# Files


def load(folder: Path) -> ChimeraWeights:
    return ChimeraWeights.load(folder, HIDDEN, VOCABULARY, HEAD_DIM)


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_chimera(folder, LlamaForCausalLM.from_pretrained(tiny), torch.tensor([1, 4, 5, 149]))
    return folder


def test_saved_loaded_and_saved_it_is_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    load(saved).save(tmp_path, {})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_narrow_trigrams_and_matrices_in_blocks(saved: Path, tmp_path: Path) -> None:
    own = load(saved)
    narrow = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(0))
    mix = rounded(torch.randn(96, 96, generator=torch.Generator().manual_seed(1)), "q8_0", torch.zeros(96))
    out = rounded(torch.randn(HIDDEN, 96, generator=torch.Generator().manual_seed(2)), "q8_0")
    made = ChimeraWeights(mix, out, own.layer, own.heads, Piece(narrow), own.said, own.words)
    made.save(tmp_path, {})
    again = load(tmp_path)
    assert again.narrow is not None and torch.equal(again.narrow.weight, narrow)
    assert again.mix.stored and torch.equal(again.mix.stored[0].rows, mix.stored[0].rows)
    assert torch.equal(again.out.weight, out.weight) and again.accuracy == ()


def test_the_authors_three_files(tiny: Path, tmp_path: Path) -> None:
    own = save_chimera(tmp_path / "own", LlamaForCausalLM.from_pretrained(tiny), wide=True)
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    for part in AUTHORS:
        held = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(part)}
        if part == "fast_layer1":
            held["0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        torch.save(held, tmp_path / f"{part}.pt")
    read = load(tmp_path)
    assert torch.equal(read.mix.weight, own.mix.weight) and torch.equal(read.layer.keys.weight, own.layer.keys.weight)
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(read.heads, own.heads, strict=True))
    assert read.words is None and read.narrow is None
    (tmp_path / "fast_layer1.pt").unlink()
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path)


KEYS, GATE = "fast_layer1.0.self_attn.k_proj.weight", "fast_layer1.0.mlp.gate_proj.weight"
DAMAGE: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "has no fast_layer1.0.self_attn.k_proj": lambda t: t.pop(KEYS),
    "has trimlp.2": lambda t: t.update({"trimlp.2.weight": torch.zeros(1)}),
    "no heads of chimera": lambda t: [t.pop(name) for name in list(t) if "head" in name],
    "must be [144, 144]": lambda t: t.update({"trimlp.0.linear.weight": torch.zeros(144, 48)}),
    "must be [48, 48]": lambda t: t.update({"chimera_head.1.0.weight": torch.zeros(49, 48)}),
    "must be [4, 96]": lambda t: t.update({"chimera_head.1.0.weight": torch.zeros(5, 96)}),
    "must all be of one kind": lambda t: t.update({"chimera_head.1.0.weight": torch.zeros(4, 96)}),
    "must be [4, 48]": lambda t: t.update({"lm_head.weight": torch.zeros(5, 48)}),
    "no lm_head.weight for its words": lambda t: t.pop("lm_head.weight"),
    "must be [48, 80]": lambda t: t.update({"fast_layer1.0.mlp.down_proj.weight": torch.zeros(80, 48)}),
    "no heads of 12 channels": lambda t: t.update(
        {KEYS: torch.zeros(20, 48), KEYS.replace("k_proj", "v_proj"): torch.zeros(20, 48)}
    ),
    "ascending ids below 150": lambda t: t.update({"token_map": torch.tensor([1, 4, 4, 149])}),
    "NaN": lambda t: t[GATE].fill_(torch.nan),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_damaged_files_are_named(saved: Path, tmp_path: Path, told: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    DAMAGE[told](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=told.replace("[", r"\[").replace("]", r"\]")):
        load(tmp_path)


def test_what_cannot_be_asked(llm: LLM, tmp_path: Path, make_drafter: Make) -> None:
    for spec, told in (
        ("chimera:nodes=0", "between 1 and 64"),
        ("chimera:width=65", "between 1 and 64"),
        ("chimera:least=2", "between 0 and 1"),
        ("chimera:tree=round", "dynamic or static"),
        (f"chimera:head={tmp_path / 'none'}", "no heads in"),
    ):
        with pytest.raises(UserError, match=told):
            make_drafter(spec)
    bare = copytree(llm.folder, tmp_path / "bare")
    (bare / "heads" / "chimera" / "model.safetensors").unlink()
    (bare / "heads" / "chimera" / "config.json").unlink()
    (bare / "heads" / "chimera").rmdir()
    with pytest.raises(UserError, match="hasten train chimera"):
        LLM(bare, "chimera")
