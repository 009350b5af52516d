"""PPD: what prompt tokens say, by transformers; that nothing sees them; and how they are stored."""

from __future__ import annotations

import json
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
from hasten.methods.heads.ppd import PPD, PromptTokens, soft_rows
from helpers import CONTEXT, Scripted

Make = Callable[[str], PPD]
PROMPT = [5, 17, 40, 5, 17]


@pytest.fixture
def make_drafter(llm: LLM) -> Make:
    """A drafter of its own for the shared model."""

    def make(spec: str) -> PPD:
        drafter = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
        assert isinstance(drafter, PPD)
        return drafter

    return make


def vectors(prompts: int, each: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, each, hidden, generator=torch.Generator().manual_seed(seed))


def adapter(folder: Path, **settings: Any) -> None:
    """As the authors' code writes it."""
    told = {"num_special_tokens": 3, "virtual_tokens_per_special_token": 2, "vt_attention_type": "ensemble"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**told, **settings}))


# The rule of who sees what


def test_an_ensembles_mask_written_by_hand():
    """Two prompt tokens of two vectors: each sees itself, and its own kind in the token before."""
    soft = soft_rows(torch.zeros(3, 2, 4), 2)
    assert soft.ahead == (1, 1, 2, 2)
    assert soft.sees.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert soft_rows(torch.zeros(3, 2, 4), 2, "decoder").sees.equal(torch.ones(4, 4).tril().bool())
    assert soft_rows(torch.zeros(3, 2, 4), 2, "encoder").sees.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_prompts_are_seen_by_nothing(tiny: Path, backend: str):
    """Whatever they are, all other rows' logits stay the same to the bit, and so does what is committed."""
    llm = LLM(tiny, dtype="float32", backend=backend)
    hidden = llm.model.config.hidden_size
    rows = []
    for size in (1.0, 1000.0):
        soft = soft_rows(size * vectors(2, 2, hidden), 2)
        draft = Draft([4, 8, 15], [ROOT, 0, ROOT], probes=[Probe.of(node, soft) for node in (ROOT, 0, 2)])
        drafter = Scripted(lambda request, draft=draft: draft)
        drafter.taps = (("final_norm", 0),)
        llm.generate([PROMPT], SamplingParams(max_tokens=9, ignore_eos=True), drafter)
        rows.append(drafter.seen[next(iter(drafter.seen))])
    for one, other in zip(*rows, strict=True):
        assert one.tokens == other.tokens
        if not one.draft:
            continue
        site = ("final_norm", 0)
        assert torch.equal(one.logits, other.logits) and torch.equal(one.taps[site], other.taps[site])
        assert one.probe_taps[site].shape == other.probe_taps[site].shape == (3 * 4, hidden)
        assert not torch.equal(one.probe_taps[site], other.probe_taps[site])


# What they say


def shown(llm: LLM, drafter: PPD, prompt: list[int], params: SamplingParams) -> list[tuple[list[int], Observation]]:
    """Of each verification the tokens before it, and what it showed."""
    seen = []
    observe = drafter.observe

    def told(request: Any, observation: Observation) -> None:
        seen.append((request.tokens[: -len(observation.tokens)], observation))
        observe(request, observation)

    drafter.observe = told  # type: ignore[method-assign]
    llm.generate([prompt], params, drafter)
    return seen


@pytest.mark.parametrize("each", [1, 2])
def test_guesses_are_what_the_target_says_of_vectors_behind_its_text(
    llm: LLM, tmp_path: Path, make_drafter: Make, each: int
):
    """By transformers: the text up to the node that was accepted last, then the vectors; the mask is spelt out."""
    hidden = llm.model.config.hidden_size
    own = PromptTokens(vectors(2, each, hidden))
    own.save(tmp_path / "ppd", {})
    drafter = make_drafter(f"ppd:sized=false,nodes=6,rows=60,ranks=3,head={tmp_path / 'ppd'}")
    reference = LlamaForCausalLM.from_pretrained(llm.folder, attn_implementation="eager")
    seen = shown(llm, drafter, PROMPT, SamplingParams(max_tokens=24, ignore_eos=True))
    checked = 0
    for (_, observation), (after, following) in pairwise(seen):
        if not following.draft or not observation.draft.probes:
            continue
        node = observation.path[-1] if observation.path else ROOT
        probe = next(each for each in observation.draft.probes if each.node == node)
        count, text = len(probe.tokens) // each, len(after) - 1
        # Everything before the root of the draft, whose token the same row said.
        embedded = torch.cat(
            [reference.model.embed_tokens(torch.tensor(after[:-1])), own.vectors[:count].flatten(0, 1)]
        )
        places = [*range(text), *(text + row // each for row in range(count * each))]
        rows = range(text + count * each)
        visible = torch.tensor([[_sees(i, j, text, each) for j in rows] for i in rows])
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        with torch.inference_mode():
            states = reference.model(
                inputs_embeds=embedded[None], attention_mask=mask[None, None], position_ids=torch.tensor([places])
            ).last_hidden_state[0, text:]
            best = reference.lm_head(states.view(count, each, hidden).mean(1)).topk(3).indices.tolist()
        # What the end of the text leaves no room for is not drafted.
        assert {token for token, depth in _levels(following.draft)} <= {token for ranks in best for token in ranks}
        assert all(token in best[depth - 1] for token, depth in _levels(following.draft))
        assert following.draft.tokens[0] == best[0][0]
        checked += 1
    assert checked > 3


def _sees(i: int, j: int, text: int, each: int) -> bool:
    if i < text or j < text:
        return j <= i
    return j <= i and (i - text) % each == (j - text) % each


def _levels(draft: Draft) -> list[tuple[int, int]]:
    return list(zip(draft.tokens, draft.depths(), strict=True))


def test_rows_are_no_more_than_may_be_and_prompts_end_with_the_context(llm: LLM, make_drafter: Make):
    drafter = make_drafter("ppd:sized=false,rows=17")
    prompt = [PROMPT[place % 5] for place in range(CONTEXT - 20)]
    asked = SamplingParams(max_tokens=500, ignore_eos=True)
    seen = shown(llm, drafter, prompt, asked)
    assert max(1 + each.draft.rows for _, each in seen) == 17
    for before, each in seen:
        assert len(before) - 1 + max(each.draft.probed()[1], default=0) < CONTEXT
    assert llm.generate([prompt], asked, "ppd:sized=false")[0].token_ids == llm.generate([prompt], asked)[0].token_ids


def test_rows_are_those_that_pay(llm: LLM, make_drafter: Make, monkeypatch: pytest.MonkeyPatch):
    """Where a second row costs as much as the first, nothing is drafted; where it is free, everything is."""
    from hasten.engine.drafting.cost import VerifyCost

    for each, least, most in ((1.0, 1, 1), (0.0001, 30, 40)):
        curve = VerifyCost((1, 64), (64,), ((1.0, 1.0 + 63 * each),), 0.0)
        monkeypatch.setattr("hasten.methods.heads.probing.verify_cost", lambda model, folder, curve=curve: curve)
        drafter = make_drafter("ppd")
        drafter.prepare()
        seen = shown(llm, drafter, PROMPT, SamplingParams(max_tokens=24, ignore_eos=True))
        assert least <= max(1 + each.draft.rows for _, each in seen) <= most


def test_memory_goes_with_requests(llm: LLM, make_drafter: Make):
    drafter = make_drafter("ppd:sized=false")
    own = drafter.memory_bytes
    assert own == 3 * llm.model.config.hidden_size * 4
    llm.generate([PROMPT] * 3, SamplingParams(max_tokens=8), drafter)
    assert drafter.memory_bytes == own


# Files


def test_saved_loaded_and_saved_it_is_the_same_bytes(tmp_path: Path):
    own = PromptTokens(vectors(2, 3, 8), "ensemble", ((0.5, 0.25), (0.25, 0.125)))
    own.save(tmp_path / "one", {"target": "x"})
    loaded = PromptTokens.load(tmp_path / "one", 8)
    assert torch.equal(loaded.vectors, own.vectors) and loaded.accuracy == own.accuracy
    loaded.save(tmp_path / "two", {"target": "x"})
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_authors_files(tmp_path: Path, name: str):
    """Token by token, each with all its vectors; nothing is changed beside them."""
    adapter(tmp_path, peft_type="PROMPT_TUNING")
    tensors = {"prompt_embeddings": vectors(3, 2, 8).flatten(0, 1)}
    save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(tensors, tmp_path / name)
    before = (tmp_path / "adapter_config.json").read_bytes()
    loaded = PromptTokens.load(tmp_path, 8)
    assert torch.equal(loaded.vectors, vectors(3, 2, 8)) and loaded.accuracy == ()
    assert (tmp_path / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_special_tokens": 2}, r"must be \[4, 8\]"),
        ({"num_special_tokens": 0}, "must say num_special_tokens"),
        ({"vt_attention_type": "all"}, "must be ensemble, decoder, encoder"),
        ({"aggregation_type": "weighted"}, "aggregation_type 'weighted' is not known"),
        ({"use_custom_lm_head": True}, "use_custom_lm_head True is not known"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, settings: dict[str, Any], told: str):
    adapter(tmp_path, **settings)
    save_file({"prompt_embeddings": vectors(3, 2, 8).flatten(0, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=told):
        PromptTokens.load(tmp_path, 8)


def test_what_cannot_be_asked(tiny: Path, tmp_path: Path, make_drafter: Make):
    for spec, told in (
        ("ppd:nodes=0", "between 1 and 64"),
        ("ppd:rows=1", "between 2 and 128"),
        (f"ppd:head={tmp_path / 'none'}", "no adapter in"),
    ):
        with pytest.raises(UserError, match=told):
            make_drafter(spec)
    bare = copytree(tiny, tmp_path / "bare")
    rmtree(bare / "heads")
    with pytest.raises(UserError, match="hasten train ppd"):
        LLM(bare, "ppd")
