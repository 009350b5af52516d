"""Hydra: what its heads compute, how they are stored, and what they draft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conformance.cases import PROMPTS, params
from hasten import LLM, SamplingParams
from hasten.engine import ROOT, Draft, Observation, Target
from hasten.engine.creation import create
from hasten.errors import UserError
from hasten.methods.heads.hydra import Hydra, HydraHeads, PrefixHydra
from hasten.methods.heads.hydra_weights import HydraWeights
from helpers import ACCURACY, prefix_layer, same, save_hydra

Make = Callable[[str], Hydra | PrefixHydra]
HIDDEN, VOCABULARY, HEADS = 8, 20, 3
PROMPT = [5, 17, 40, 5, 17]


@pytest.fixture
def make_drafter(llm: LLM) -> Make:
    """A drafter of its own for the shared model."""

    def make(spec: str) -> Hydra:
        drafter = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
        assert isinstance(drafter, Hydra | PrefixHydra)
        return drafter

    return make


def small(folder: Path, layers: int = 1, shared: bool = False) -> HydraWeights:
    noise = torch.Generator().manual_seed(0)
    return save_hydra(folder, torch.randn(VOCABULARY, HIDDEN, generator=noise), layers, shared)


def plainly(weights: HydraWeights, head: int, state: Tensor, embedded: Tensor) -> Tensor:
    """Logits [words] of a head as the paper writes it, from a state [hidden] and embeddings [head + 1, hidden]."""
    own, output = weights.heads[head], weights.outputs[min(head, len(weights.outputs) - 1)]
    z = torch.cat([state, *embedded])
    x = F.linear(z, own.carry.weight, own.carry.bias) + F.silu(F.linear(z, own.mix.weight, own.mix.bias))
    for _ in range(weights.layers - 1):
        assert own.block is not None
        x = x + F.silu(F.linear(x, own.block.weight, own.block.bias))
    return F.linear(x, output.weight, output.bias)


def shown(llm: LLM, drafter: Hydra | PrefixHydra, prompt: list[int]) -> list[tuple[list[int], Draft]]:
    """Before each verification the committed tokens, and the draft."""
    seen = []
    observe = drafter.observe

    def told(request: Any, observation: Observation) -> None:
        seen.append((request.tokens[: -len(observation.tokens)], observation.draft))
        observe(request, observation)

    drafter.observe = told  # type: ignore[method-assign]
    llm.generate([prompt], SamplingParams(max_tokens=24, ignore_eos=True), drafter)
    return [(tokens, draft) for tokens, draft in seen if draft]


def test_sums_of_parts_are_the_product_of_the_whole(llm: LLM, tmp_path: Path) -> None:
    weight = llm.model.head.dequant()
    own = save_hydra(tmp_path, weight, layers=3)
    heads, noise = HydraHeads(llm.model, own), torch.Generator().manual_seed(1)
    states, tokens = torch.randn(4, weight.shape[1], generator=noise), [[5, 6, 7, 8], [9, 9, 9, 3], [2, 1, 40, 41]]
    sums = heads.begin(states)
    for head in range(HEADS):
        sums = heads.extend(head, sums, tokens[head])
        for row, logits in enumerate(heads.logits(head, sums[:, 0])):
            embedded = llm.model.embedding[torch.tensor([each[row] for each in tokens[: head + 1]])]
            torch.testing.assert_close(logits, plainly(own, head, states[row], embedded), rtol=1e-4, atol=1e-4)
        sums = sums[:, 1:]


@pytest.mark.parametrize("prefixed", [False, True])
def test_drafts_are_the_best_paths_of_all(llm: LLM, make_drafter: Make, tmp_path: Path, prefixed: bool) -> None:
    """By transformers: of all paths of four ranks, told one by one, the most probable ones."""
    reference = LlamaForCausalLM.from_pretrained(llm.folder)
    layer = prefix_layer(reference.config) if prefixed else None
    own = save_hydra(tmp_path, reference.lm_head.weight.detach(), 2, prefix=layer)
    drafter = make_drafter(f"hydra:head={tmp_path},nodes=9,ranks=4,least=0,sized=false")
    assert isinstance(drafter, PrefixHydra if prefixed else Hydra)

    @torch.inference_mode()
    def paths(committed: list[int]) -> dict[tuple[int, ...], float]:
        states = reference.model(torch.tensor([committed])).last_hidden_state
        state = (states if layer is None else layer(inputs_embeds=states).last_hidden_state)[0, -2]
        found: dict[tuple[int, ...], float] = {(): 1.0}
        level = [()]
        for head in range(HEADS):
            deeper = []
            for path in level:
                embedded = reference.model.embed_tokens(torch.tensor([committed[-1], *path]))
                best = plainly(own, head, state, embedded).softmax(-1).topk(4)
                for chance, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    found[*path, token] = found[path] * chance
                    deeper.append((*path, token))
            level = deeper
        return found

    steps = shown(llm, drafter, PROMPT)[:6]
    assert len(steps) > 3
    for committed, draft in steps:
        expected = paths(committed)
        told = {
            tuple(draft.tokens[node] for node in draft.path(place)): draft.estimates[place]
            for place in range(len(draft))
        }
        best = sorted((chance for path, chance in expected.items() if path), reverse=True)[:9]
        assert sorted(told.values(), reverse=True) == pytest.approx(best, rel=1e-3)
        assert all(chance == pytest.approx(expected[path], rel=1e-3) for path, chance in told.items())


@pytest.fixture
def plus(tiny: Path) -> str:
    """Heads with a prefix layer."""
    return f"hydra:head={tiny / 'heads' / 'hydra-prefix'},sized=false"


@pytest.mark.parametrize("kind", ["greedy", "sampled", "everything"])
def test_with_a_prefix_layer_nothing_changes_but_speed(llm: LLM, plus: str, kind: str) -> None:
    asked = [params(number, kind) for number in range(0, len(PROMPTS), 9)]
    prompts = PROMPTS[::9]
    accepted = 0
    for plain, ours in zip(llm.generate(prompts, asked), llm.generate(prompts, asked, plus), strict=True):
        same(ours.choices[0], plain.choices[0])
        accepted += ours.choices[0].statistics.accepted
    assert accepted > 0


def test_a_prefix_layer_of_another_target_is_refused(llm: LLM, tmp_path: Path, make_drafter: Make) -> None:
    reference = LlamaForCausalLM.from_pretrained(llm.folder)
    save_hydra(tmp_path, reference.lm_head.weight.detach(), prefix=prefix_layer(reference.config))
    tensors, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    name = "prefix_embeding_layer.layers.0.self_attn.k_proj.weight"
    for broken, told in ((tensors[name][:7], "no heads of"), (None, "has no layers.0.self_attn.k_proj")):
        save_file({**tensors, name: broken} if broken is not None else without(tensors, name), file)
        with pytest.raises(UserError, match=told):
            make_drafter(f"hydra:head={tmp_path}")


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {each: tensor for each, tensor in tensors.items() if each != name}


def test_a_static_tree_is_that_of_the_accuracy(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("hydra:tree=static,nodes=4,least=0,sized=false")
    drafts = [draft for _, draft in shown(llm, drafter, PROMPT) if len(draft) == 4]
    assert ACCURACY[1][0] == 0.4
    assert drafts and all(draft.estimates == pytest.approx([0.6, 0.24, 0.2, 0.12]) for draft in drafts)


def test_what_is_hardly_likely_gets_no_children(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("hydra:nodes=9,least=0.9,sized=false")
    for _, draft in shown(llm, drafter, PROMPT):
        first = sum(draft.estimates[node] for node, parent in enumerate(draft.parents) if parent == ROOT)
        assert first >= 0.9 or all(parent == ROOT for parent in draft.parents)


def test_a_batch_drafts_as_its_requests_do(llm: LLM, make_drafter: Make) -> None:
    prompts = [PROMPT, [7, 8, 9], [40, 41] * 9]
    asked = SamplingParams(max_tokens=16, ignore_eos=True)
    together = llm.generate(prompts, asked, "hydra:sized=false")
    for prompt, both in zip(prompts, together, strict=True):
        (alone,) = llm.generate([prompt], asked, "hydra:sized=false")
        assert alone.token_ids == both.token_ids
        assert alone.choices[0].statistics.accepted_per_step == both.choices[0].statistics.accepted_per_step


def test_memory_is_that_of_the_heads_and_goes_with_requests(llm: LLM, make_drafter: Make) -> None:
    drafter = make_drafter("hydra")
    heads = drafter.memory_bytes
    assert heads > 0
    llm.generate([PROMPT] * 3, SamplingParams(max_tokens=8), drafter)
    assert drafter.memory_bytes == heads


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_saved_loaded_and_saved_it_is_the_same_bytes(tmp_path: Path, layers: int, shared: bool) -> None:
    own = small(tmp_path / "one", layers, shared)
    loaded = HydraWeights.load(tmp_path / "one", HIDDEN, VOCABULARY)
    assert loaded.layers == layers and len(loaded.outputs) == (1 if shared else HEADS) and loaded.accuracy == ACCURACY
    loaded.save(tmp_path / "two", {})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    state, embedded = torch.ones(HIDDEN), torch.ones(HEADS, HIDDEN)
    torch.testing.assert_close(plainly(own, 2, state, embedded), plainly(loaded, 2, state, embedded))


def authors(folder: Path, layers: int) -> dict[str, Tensor]:
    """As PyTorch names the authors' modules: one block stands in several places."""
    tensors = load_file(folder / "model.safetensors")
    for k in range(HEADS):
        for j in range(2, layers):
            for part in ("weight", "bias"):
                tensors[f"hydra_mlp.{k}.{j}.linear.{part}"] = tensors[f"hydra_mlp.{k}.1.linear.{part}"].clone()
    return tensors | {"input_embed_fn.weight": torch.zeros(VOCABULARY, HIDDEN)}


@pytest.mark.parametrize("name", ["hydra_lm_head.safetensors", "hydra_lm_head.pt"])
def test_the_authors_files(tmp_path: Path, name: str) -> None:
    own = small(tmp_path / "own", layers=4)
    tensors = authors(tmp_path / "own", layers=4)
    save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(tensors, tmp_path / name)
    told = {"hydra_num_layers": 4, "hydra_num_heads": HEADS, "hydra_head_arch": "mlp", "grounded_heads": True}
    (tmp_path / "config.json").write_text(json.dumps(told))
    loaded = HydraWeights.load(tmp_path, HIDDEN, VOCABULARY)
    state, embedded = torch.ones(HIDDEN), torch.ones(HEADS, HIDDEN)
    assert loaded.layers == 4
    torch.testing.assert_close(plainly(own, 2, state, embedded), plainly(loaded, 2, state, embedded))


def test_the_authors_files_with_a_prefix_layer(tmp_path: Path) -> None:
    """Dropout stands between their blocks, and copies of the target's embedding beside them."""
    shape = {"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": VOCABULARY}
    layer = prefix_layer(LlamaConfig(**shape))
    own = save_hydra(tmp_path / "own", torch.ones(VOCABULARY, HIDDEN), layers=4, prefix=layer)
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    assert {
        "hydra_mlp.0.1.res_connection.bias",
        "hydra_mlp.0.3.linear.bias",
        "hydra_lm_head.2.1.bias",
    } <= tensors.keys()
    for k in range(HEADS):
        for part in PARTS:
            tensors |= {f"hydra_mlp.{k}.{j}.linear.{part}": tensors[f"hydra_mlp.{k}.3.linear.{part}"] for j in (5, 7)}
    copy = torch.zeros(VOCABULARY, HIDDEN)
    tensors |= {"input_embed_fn.weight": copy, "prefix_embeding_layer.embed_tokens.weight": copy}
    torch.save(tensors, tmp_path / "hydra_lm_head.pt")
    loaded = HydraWeights.load(tmp_path, HIDDEN, VOCABULARY)
    assert loaded.layers == 4 and set(loaded.prefix) == set(layer.state_dict()) - {"embed_tokens.weight"}
    state, embedded = torch.ones(HIDDEN), torch.ones(HEADS, HIDDEN)
    torch.testing.assert_close(plainly(own, 2, state, embedded), plainly(loaded, 2, state, embedded))


DAMAGE: dict[str, Any] = {
    "has no hydra_lm_head.1.weight": lambda t: t.pop("hydra_lm_head.1.weight"),
    "has no hydra_mlp.2.0.res_connection": lambda t: [t.pop(f"hydra_mlp.2.0.res_connection.{p}") for p in PARTS],
    "has odd, which": lambda t: t.update({"odd": torch.zeros(1)}),
    "hydra_mlp.1.0.linear.weight is [24, 8], and must be [8, 24]": lambda t: t.update(
        {"hydra_mlp.1.0.linear.weight": t["hydra_mlp.1.0.linear.weight"].T.contiguous()}
    ),
    "must be [20, 8]": lambda t: t.update({"hydra_lm_head.0.weight": torch.zeros(19, 8)}),
    "must be the same block": lambda t: t["hydra_mlp.0.2.linear.weight"].add_(1),
    "NaN": lambda t: t["hydra_mlp.0.0.linear.bias"].fill_(torch.nan),
    "no heads of hydra": lambda t: [t.pop(name) for name in list(t) if name.startswith("hydra_mlp")],
}
PARTS = ("weight", "bias")


@pytest.mark.parametrize("told", DAMAGE)
def test_damaged_files_are_named(tmp_path: Path, told: str) -> None:
    small(tmp_path / "own", layers=3)
    tensors = authors(tmp_path / "own", layers=3)
    DAMAGE[told](tensors)
    torch.save(tensors, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(UserError) as refused:
        HydraWeights.load(tmp_path, HIDDEN, VOCABULARY)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("told", "value"),
    [
        ("hydra_head_arch", "eagle-attn"),
        ("grounded_heads", False),
        ("hidden_state_offset", 1),
        ("hydra_num_layers", 5),
    ],
)
def test_heads_of_another_kind_are_named(tmp_path: Path, told: str, value: object) -> None:
    small(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, told: value}))
    with pytest.raises(UserError, match=f"{told} is {value!r}"):
        HydraWeights.load(tmp_path, HIDDEN, VOCABULARY)


def test_what_cannot_be_asked(llm: LLM, tmp_path: Path, make_drafter: Make) -> None:
    for spec, told in (
        ("hydra:nodes=0", "between 1 and 64"),
        ("hydra:width=65", "between 1 and 64"),
        ("hydra:tree=round", "dynamic or static"),
        ("hydra:least=2", "between 0 and 1"),
        (f"hydra:head={tmp_path / 'none'}", "no heads in"),
    ):
        with pytest.raises(UserError, match=told):
            make_drafter(spec)
    small(tmp_path / "other")
    with pytest.raises(UserError, match="must be"):
        make_drafter(f"hydra:head={tmp_path / 'other'}")
