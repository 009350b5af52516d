"""EasySpec: attention layers that read one input, and the cache that is exact again before each draft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache
from hasten.engine import Engine
from hasten.methods.systems.easyspec import LayerSeconds, critical_path, fuzzy, groups
from hasten.model import Rows
from hasten.model.native.library import LIBRARY
from helpers import make_model, make_tokenizer, same

TEXT = [number * 13 % 140 + 2 for number in range(1, 30)]
PROMPTS = [TEXT, TEXT[3:9], TEXT[::-1]]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A target of seven layers, and a noisy copy as its drafter."""
    folder = tmp_path_factory.mktemp("deep")
    for name, noise in (("tiny", 0.0), ("tiny-draft", 0.03)):
        make_model(noise, num_hidden_layers=7).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder / "tiny"


@pytest.fixture(scope="module", params=["torch", *(["native"] if LIBRARY.exists() else [])])
def deep_llm(request: pytest.FixtureRequest, deep: Path) -> LLM:
    return LLM(deep, dtype="float32", backend=request.param)


def sequence_of(llm: LLM):
    return Cache(llm.model.config.layers, llm.model.cache_dtype, llm.model.device).sequence()


def test_first_and_last_layer_stand_alone():
    assert [list(group) for group in groups(8, 4)] == [[0], [1, 2, 3, 4], [5, 6], [7]]
    assert [list(group) for group in groups(5, 1)] == [[0], [1], [2], [3], [4]]
    assert [list(group) for group in groups(2, 4)] == [[0], [1]]
    assert [list(group) for group in groups(1, 4)] == [[0]]


def test_one_at_a_time_is_the_model(deep_llm):
    """To the bit, where rows are alike to the bit."""
    model = deep_llm.model
    expected = model.forward(Rows.of(sequence_of(deep_llm), TEXT, 0))
    got = fuzzy(model, Rows.of(sequence_of(deep_llm), TEXT, 0), None, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if model.backend.name == "torch":
        assert torch.equal(got, expected)


@pytest.mark.parametrize("parallel", [2, 3, 5])
def test_what_a_fuzzy_pass_computes(deep, deep_llm, parallel):
    """Transformers' own modules in the paper's order."""
    reference = LlamaForCausalLM.from_pretrained(deep, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = torch.tensor([TEXT])
    with torch.inference_mode():
        x = reference.model.embed_tokens(tokens)
        angles = reference.model.rotary_emb(x, torch.arange(len(TEXT))[None])
        for group in groups(7, parallel):
            entered = x
            for layer in (reference.model.layers[index] for index in group):
                x = x + _attention(layer.self_attn, layer.input_layernorm(entered), angles)
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        expected = reference.lm_head(reference.model.norm(x))[0]
    got = fuzzy(deep_llm.model, Rows.of(sequence_of(deep_llm), TEXT, 0), None, parallel)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
    exact = deep_llm.model.forward(Rows.of(sequence_of(deep_llm), TEXT, 0))
    assert (got - exact).abs().max() > 0.05


def _attention(layer, x, angles):
    shape = (1, x.shape[1], -1, layer.head_dim)
    queries, keys, values = (each(x).view(shape).transpose(1, 2) for each in (layer.q_proj, layer.k_proj, layer.v_proj))
    queries, keys = apply_rotary_pos_emb(queries, keys, *angles)
    keys, values = (repeat_kv(each, layer.num_key_value_groups) for each in (keys, values))
    scores = queries @ keys.transpose(2, 3) * layer.scaling
    causal = torch.full(scores.shape[-2:], -torch.inf).triu(1)
    mixed = (scores + causal).softmax(-1) @ values
    return layer.o_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [{}, {"temperature": 0.8, "seed": 2}], ids=["greedy", "sampled"])
def test_tokens_are_the_target_s(deep_llm, kind):
    asked = SamplingParams(max_tokens=20, logprobs=2, **kind)
    expected = deep_llm.generate(PROMPTS, asked, "plain")
    for spec in ("easyspec", "easyspec:parallel=2,width=3", "easyspec:parallel=3,calibration=false"):
        got = deep_llm.generate(PROMPTS, asked, spec)
        for mine, theirs in zip(got, expected, strict=True):
            same(mine.choices[0], theirs.choices[0])
        assert sum(each.choices[0].statistics.accepted for each in got) > 0


def recorded(llm: LLM, spec: str):
    """The drafter behind a request that has come some way, its tokens, and its drafts."""
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    drafter, drafts = engine.drafter(spec)[1], []
    propose_all = drafter.propose_all

    def note(requests, budgets):
        proposed = propose_all(requests, budgets)
        drafts.append((list(requests[0].tokens), list(proposed[0].tokens)))
        return proposed

    drafter.propose_all = note
    request = engine.add(TEXT, SamplingParams(max_tokens=40, ignore_eos=True), spec)[0]
    while len(request.output) < 25:
        engine.step()
    return drafter, request, drafts


def test_calibration_leaves_exact_keys_and_values(deep_llm):
    """After each draft the committed slots are those of the exact model over the text; without calibration they are
    not, as soon as a drafted token was accepted."""
    for calibration in ("true", "false"):
        drafter, request, drafts = recorded(
            deep_llm, f"easyspec:parallel=3,confidence=0,length=4,calibration={calibration}"
        )
        sequence = drafter._sequences[request.id]
        known = drafts[-1][0][: sequence.length]
        fresh = Cache(drafter.model.config.layers, drafter.model.cache_dtype, drafter.model.device).sequence()
        drafter.model.forward(Rows.of(fresh, known, 0))
        fresh.commit(len(known))
        differences = []
        for mine, theirs in zip(sequence.memory(0), fresh.memory(0), strict=True):
            (block, count), (other, _) = mine, theirs
            differences.append((block.keys[:, :, :count] - other.keys[:, :, :count]).abs().max())
        assert request.statistics.accepted > 0
        assert (max(differences) <= 1e-5) == (calibration == "true")


def test_critical_path():
    """Two exact layers and two groups of eight layers: four attentions, two gathers, eight MLPs, the head."""
    seconds = LayerSeconds(attention=3.0, mlp=2.0, head=5.0, gather=0.5)
    assert critical_path(seconds, 8, 4) == 4 * 3 + 2 * 0.5 + 8 * 2 + 5
    assert critical_path(seconds, 8, 1) == 8 * 3 + 8 * 2 + 5


def test_what_it_refuses(deep_llm):
    with pytest.raises(UserError, match="easyspec: parallel must be between 1 and 16"):
        deep_llm.engine.drafter("easyspec:parallel=0")
