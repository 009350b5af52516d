"""Medusa: what its heads compute, how they are stored, and what they draft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hasten import LLM, SamplingParams
from hasten.engine import Draft, Observation, Target
from hasten.engine.creation import create
from hasten.errors import UserError
from hasten.methods.heads.head import beside
from hasten.methods.heads.medusa import Medusa, MedusaParameters, MedusaWeights
from hasten.model.weights import Piece

Make = Callable[[str], Medusa]
HIDDEN, VOCABULARY = 8, 20
PROMPT = [5, 17, 40, 5, 17]


@pytest.fixture
def make_drafter(llm: LLM) -> Make:
    """A drafter of its own for the shared model."""

    def make(spec: str) -> Medusa:
        drafter = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
        assert isinstance(drafter, Medusa)
        return drafter

    return make


def weights(heads: int = 2, layers: int = 1, words: Tensor | None = None, private: bool = True) -> MedusaWeights:
    noise = torch.Generator().manual_seed(heads + layers)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise)

    size = VOCABULARY if words is None else len(words)
    return MedusaWeights(
        [[Piece(drawn(HIDDEN, HIDDEN), drawn(HIDDEN)) for _ in range(layers)] for _ in range(heads)],
        [Piece(drawn(size, HIDDEN)) for _ in range(heads)] if private else [],
        words,
        ((0.5, 0.25), (0.25, 0.125)) if heads == 2 else (),
    )


def authors(own: MedusaWeights) -> dict[str, Tensor]:
    """As the authors name tensors."""
    tensors = {f"{k}.{len(own.blocks[0])}.weight": head.weight for k, head in enumerate(own.heads)}
    for k, layers in enumerate(own.blocks):
        for j, block in enumerate(layers):
            assert block.bias is not None
            tensors |= {f"{k}.{j}.linear.weight": block.weight, f"{k}.{j}.linear.bias": block.bias}
    return tensors


def same(a: MedusaWeights, b: MedusaWeights) -> None:
    for mine, theirs in zip(a.blocks, b.blocks, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(a.heads, b.heads, strict=True))
    assert (a.words is None) == (b.words is None) and (a.words is None or torch.equal(a.words, b.words))


@pytest.mark.parametrize("words", [None, torch.tensor([1, 4, 5, 19])])
@pytest.mark.parametrize(("heads", "layers"), [(2, 1), (3, 2)])
def test_saved_loaded_and_saved_it_is_the_same_bytes(
    tmp_path: Path, heads: int, layers: int, words: Tensor | None
) -> None:
    own = weights(heads, layers, words)
    own.save(tmp_path / "one", {"target": "x"})
    loaded = MedusaWeights.load(tmp_path / "one", HIDDEN, VOCABULARY)
    same(own, loaded)
    assert loaded.accuracy == own.accuracy
    loaded.save(tmp_path / "two", {"target": "x"})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_the_authors_files(tmp_path: Path, name: str, private: bool) -> None:
    own = weights(3, 2, private=private)
    save_file(authors(own), tmp_path / name) if name.endswith("s") else torch.save(authors(own), tmp_path / name)
    # Published configurations say two heads where there are five: shapes are believed.
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    same(MedusaWeights.load(tmp_path, HIDDEN, VOCABULARY), own)


def broken(change: Any) -> Any:
    tensors = {name: tensor.clone() for name, tensor in load_saved().items()}
    change(tensors)
    return tensors


def load_saved() -> dict[str, Tensor]:
    own = weights(words=torch.tensor([1, 4, 5, 19]))
    assert own.words is not None
    tensors = {f"lm_heads.{k}.weight": head.weight for k, head in enumerate(own.heads)} | {"token_map": own.words}
    for k, (block,) in enumerate(own.blocks):
        assert block.bias is not None
        tensors |= {f"blocks.{k}.layers.0.weight": block.weight, f"blocks.{k}.layers.0.bias": block.bias}
    return tensors


DAMAGE = {
    "has no lm_heads.1": lambda t: t.pop("lm_heads.1.weight"),
    "has lm_heads.2": lambda t: t.update({"lm_heads.2.weight": t["lm_heads.0.weight"].clone()}),
    "must be [4, 8]": lambda t: t.update({"lm_heads.0.weight": t["lm_heads.0.weight"].T.contiguous()}),
    "must be [8, 8]": lambda t: t.update({"blocks.0.layers.0.weight": torch.zeros(8, 9)}),
    "must be [8]": lambda t: t.update({"blocks.0.layers.0.bias": torch.zeros(9)}),
    "must be ascending ids below 20": lambda t: t.update({"token_map": torch.tensor([1, 4, 4, 19])}),
    "ascending ids below": lambda t: t.update({"token_map": torch.tensor([1, 4, 5, 20])}),
    "NaN": lambda t: t["lm_heads.0.weight"].fill_(torch.nan),
    "no heads of medusa": lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks")],
}


@pytest.mark.parametrize("told", DAMAGE)
def test_damaged_files_are_named(tmp_path: Path, told: str) -> None:
    save_file(broken(DAMAGE[told]), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=told.replace("[", r"\[").replace("]", r"\]")):
        MedusaWeights.load(tmp_path, HIDDEN, VOCABULARY)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x80\x04N."])
@pytest.mark.parametrize("name", ["model.safetensors", "medusa_lm_head.pt"])
def test_files_of_something_else(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot read"):
        MedusaWeights.load(tmp_path, HIDDEN, VOCABULARY)


@pytest.mark.parametrize("table", [[[0.5]], [[0.5], [2.0]], [["a"], [0.1]], 3])
def test_an_accuracy_that_is_none(tmp_path: Path, table: Any) -> None:
    weights().save(tmp_path, {"accuracy": table})
    with pytest.raises(UserError, match="accuracy must be shares"):
        MedusaWeights.load(tmp_path, HIDDEN, VOCABULARY)


def shown(llm: LLM, drafter: Medusa, prompt: list[int]) -> list[tuple[list[int], Draft]]:
    """Before each verification the committed tokens, and the draft."""
    seen = []
    observe = drafter.observe

    def told(request: Any, observation: Observation) -> None:
        seen.append((request.tokens[: -len(observation.tokens)], observation.draft))
        observe(request, observation)

    drafter.observe = told  # type: ignore[method-assign]
    llm.generate([prompt], SamplingParams(max_tokens=24, ignore_eos=True), drafter)
    return seen


def test_drafts_are_the_heads_of_the_row_before_the_root(llm: LLM, make_drafter: Make) -> None:
    """By transformers: heads on the final state of the last token but one of what is committed."""
    drafter = make_drafter("medusa:nodes=9,ranks=4,sized=false")
    folder = Path(drafter.parameters.head)
    own = MedusaWeights.load(folder, llm.model.config.hidden_size, llm.model.config.vocab_size)
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(llm.folder)
    checked = 0
    for committed, draft in shown(llm, drafter, PROMPT):
        if not draft:
            continue
        with torch.inference_mode():
            state = reference.model(torch.tensor([committed])).last_hidden_state[0, -2]
        expected = []
        for layers, head in zip(own.blocks, own.heads, strict=True):
            x = state
            for block in layers:
                x = x + F.silu(F.linear(x, block.weight, block.bias))
            best = (head.weight @ x).softmax(-1).topk(4)
            expected.append((best.values.tolist(), best.indices.tolist()))
        for node, token in enumerate(draft.tokens):
            path = draft.path(node)
            level = len(path) - 1
            assert token in expected[level][1]
            chances = [
                expected[depth][0][expected[depth][1].index(draft.tokens[step])] for depth, step in enumerate(path)
            ]
            assert draft.estimates[node] == pytest.approx(torch.tensor(chances).prod().item(), rel=1e-3)
        checked += 1
    assert checked > 3


def test_a_static_tree_is_that_of_the_accuracy(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("medusa:tree=static,nodes=4,sized=false")
    drafts = [draft for _, draft in shown(llm, drafter, PROMPT) if len(draft) == 4]
    assert drafts and all(draft.estimates == pytest.approx([0.6, 0.24, 0.2, 0.12]) for draft in drafts)


def test_heads_of_few_words_draft_only_these(llm: LLM, tmp_path: Path, make_drafter: Make) -> None:
    config = llm.model.config
    words = torch.arange(3, config.vocab_size, 5)
    noise = torch.Generator().manual_seed(0)
    hidden = config.hidden_size
    block = Piece(torch.zeros(hidden, hidden), torch.zeros(hidden))
    MedusaWeights([[block]], [Piece(torch.randn(len(words), hidden, generator=noise))], words).save(
        tmp_path / "few", {}
    )
    drafter = make_drafter(f"medusa:sized=false,head={tmp_path / 'few'}")
    drafted = {token for _, draft in shown(llm, drafter, PROMPT) for token in draft.tokens}
    assert drafted and drafted <= set(words.tolist())


def test_memory_is_that_of_the_heads_and_goes_with_requests(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("medusa")
    heads = drafter.memory_bytes
    assert heads > 0
    llm.generate([PROMPT] * 3, SamplingParams(max_tokens=8), drafter)
    assert drafter.memory_bytes == heads


def test_what_cannot_be_asked(llm: LLM, tiny: Path, tmp_path: Path, make_drafter: Make) -> None:
    for spec, told in (
        ("medusa:nodes=0", "between 1 and 64"),
        ("medusa:ranks=65", "between 1 and 64"),
        ("medusa:tree=round", "dynamic or static"),
        (f"medusa:head={tmp_path / 'none'}", "no heads in"),
    ):
        with pytest.raises(UserError, match=told):
            make_drafter(spec)
    bare = copytree(tiny, tmp_path / "bare")
    for file in (bare / "heads" / "medusa").iterdir():
        file.unlink()
    (bare / "heads" / "medusa").rmdir()
    with pytest.raises(UserError, match="hasten train medusa"):
        LLM(bare, "medusa")
    weights().save(bare / "heads" / "medusa", {})
    with pytest.raises(UserError, match="must be"):
        LLM(bare, "medusa")


def test_a_gguf_files_heads_stand_beside_it() -> None:
    assert beside(Path("/m/x.gguf"), "medusa") == Path("/m/x.gguf.heads/medusa")
    assert beside(Path("/m/x"), "medusa") == Path("/m/x/heads/medusa")


def test_parameters_have_defaults() -> None:
    assert MedusaParameters().nodes == 15
