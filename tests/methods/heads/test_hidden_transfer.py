"""Hidden transfer: what pseudo states become, by transformers' layers; that nothing sees them; how maps are stored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams
from hasten.engine import ROOT, Draft, Observation, Probe, Target
from hasten.engine.creation import create
from hasten.errors import UserError
from hasten.methods.heads.hidden_transfer import HiddenTransfer, Transfer, pseudo_rows
from helpers import Scripted

Make = Callable[[str], HiddenTransfer]
PROMPT = [5, 17, 40, 5, 17]
FINAL = ("final_norm", 0)


@pytest.fixture
def make_drafter(llm: LLM) -> Make:
    """A drafter of its own for the shared model."""

    def make(spec: str) -> HiddenTransfer:
        drafter = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
        assert isinstance(drafter, HiddenTransfer)
        return drafter

    return make


def maps(count: int, hidden: int, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.eye(hidden) + 0.3 * torch.randn(count, hidden, hidden, generator=noise)


def shown(llm: LLM, drafter: HiddenTransfer, prompt: list[int]) -> list[tuple[list[int], Observation]]:
    """Of each verification the tokens before it, and what it showed."""
    seen = []
    observe = drafter.observe

    def told(request: Any, observation: Observation) -> None:
        seen.append((request.tokens[: -len(observation.tokens)], observation))
        observe(request, observation)

    drafter.observe = told  # type: ignore[method-assign]
    llm.generate([prompt], SamplingParams(max_tokens=24, ignore_eos=True), drafter)
    return seen


def test_guesses_are_what_the_upper_layers_make_of_pseudo_states(llm: LLM, tmp_path: Path, make_drafter: Make):
    """By transformers: the state of the node that was accepted last, mapped, through the layers above the text's."""
    hidden, layer = llm.model.config.hidden_size, 1
    own = maps(2, hidden)
    Transfer(own, layer).save(tmp_path / "maps", {})
    drafter = make_drafter(f"hidden-transfer:sized=false,nodes=6,rows=60,ranks=3,head={tmp_path / 'maps'}")
    reference = LlamaForCausalLM.from_pretrained(llm.folder, attn_implementation="eager")
    checked = 0
    for (_, observation), (after, following) in pairwise(shown(llm, drafter, PROMPT)):
        if not following.draft or not observation.draft.probes:
            continue
        node = observation.path[-1] if observation.path else ROOT
        count = next(len(each.tokens) for each in observation.draft.probes if each.node == node)
        text = len(after) - 1
        places = torch.arange(text + count)[None]
        mask = torch.full((1, 1, text + count, text + count), -torch.inf).triu(1)
        with torch.inference_mode():
            below = reference.model(torch.tensor([after[:-1]]), output_hidden_states=True).hidden_states[layer][0]
            x = torch.cat([below, own[:count] @ below[-1]])[None]
            angles = reference.model.rotary_emb(x, places)
            for each in reference.model.layers[layer:]:
                x = each(x, attention_mask=mask, position_ids=places, position_embeddings=angles)
            states = reference.model.norm(x[0] if isinstance(x, tuple) else x)[0, text:]
            best = reference.lm_head(states).topk(3).indices.tolist()
        levels = list(zip(following.draft.tokens, following.draft.depths(), strict=True))
        assert all(token in best[depth - 1] for token, depth in levels)
        assert following.draft.tokens[0] == best[0][0]
        checked += 1
    assert checked > 3


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_pseudo_states_are_seen_by_nothing(tiny: Path, backend: str):
    """Whatever they are, all other rows' logits stay the same to the bit."""
    llm = LLM(tiny, dtype="float32", backend=backend)
    rows = []
    for size in (1.0, 50.0):
        soft = pseudo_rows(size * maps(2, llm.model.config.hidden_size), 1, 2)
        draft = Draft([4, 8, 15], [ROOT, 0, ROOT], probes=[Probe.of(node, soft) for node in (ROOT, 0, 2)])
        drafter = Scripted(lambda request, draft=draft: draft)
        drafter.taps = (FINAL,)
        llm.generate([PROMPT], SamplingParams(max_tokens=9, ignore_eos=True), drafter)
        rows.append(drafter.seen[next(iter(drafter.seen))])
    for one, other in zip(*rows, strict=True):
        assert one.tokens == other.tokens
        if one.draft:
            assert torch.equal(one.logits, other.logits) and torch.equal(one.taps[FINAL], other.taps[FINAL])
            assert not torch.equal(one.probe_taps[FINAL], other.probe_taps[FINAL])


def test_requests_in_a_batch_draft_as_each_does_alone(llm: LLM):
    prompts = [PROMPT, PROMPT[::-1], [9, 33, 2, 70, 71, 9]]
    asked = SamplingParams(max_tokens=24, ignore_eos=True)
    spec = "hidden-transfer:sized=false"
    for one, other in zip(
        llm.generate(prompts, asked, spec), [llm.generate([each], asked, spec)[0] for each in prompts], strict=True
    ):
        assert one.token_ids == other.token_ids
        assert one.choices[0].statistics.accepted_per_step == other.choices[0].statistics.accepted_per_step


def test_saved_loaded_and_saved_it_is_the_same_bytes(tmp_path: Path):
    own = Transfer(maps(2, 8).bfloat16(), 3, ((0.5, 0.25), (0.25, 0.125)))
    own.save(tmp_path / "one", {"target": "x"})
    loaded = Transfer.load(tmp_path / "one", 8, 4)
    assert torch.equal(loaded.maps, own.maps) and (loaded.layer, loaded.accuracy) == (3, own.accuracy)
    loaded.save(tmp_path / "two", {"target": "x"})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("tensors", "layer", "told"),
    [
        ({"transfer": maps(2, 8)}, 4, "layer must be one of the target's, 0 to 3, not 4"),
        ({"transfer": maps(2, 8)}, "1", "layer must be one of the target's"),
        ({"transfer": maps(2, 9)}, 1, r"transfer is \[2, 9, 9\], and must be \[2, 8, 8\]"),
        ({"transfer": torch.tensor(1.0)}, 1, "must be"),
        ({"other": maps(2, 8)}, 1, "has no transfer"),
        ({"transfer": torch.full((1, 8, 8), torch.nan)}, 1, "NaN"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], layer: Any, told: str):
    Transfer(maps(2, 8), 1).save(tmp_path, {"layer": layer})
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=told):
        Transfer.load(tmp_path, 8, 4)


def test_a_model_without_maps(tiny: Path, tmp_path: Path, make_drafter: Make):
    bare = copytree(tiny, tmp_path / "bare")
    rmtree(bare / "heads")
    with pytest.raises(UserError, match="hasten train hidden-transfer"):
        LLM(bare, "hidden-transfer")
    with pytest.raises(UserError, match="no maps in"):
        make_drafter(f"hidden-transfer:head={tmp_path / 'none'}")
