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
from hasten.methods.systems.easyspec import critical_path, fuzzy, groups
from hasten.model import Rows, Span
from hasten.model.native.grouped import Spent, grouped, runs_grouped
from hasten.model.native.library import LIBRARY
from hasten.model.threads import cores
from helpers import make_model, make_tokenizer, same

TEXT = [number * 13 % 140 + 2 for number in range(1, 30)]
PROMPTS = [TEXT, TEXT[3:9], TEXT[::-1]]
native = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built")


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
    """Two exact layers, a group of three and one of two: the longest attention of each, the MLPs, the head."""
    spent = Spent(attention=[9.0, 1.0, 3.0, 2.0, 4.0, 5.0, 9.0], feed_forward=[0.0, *[2.0] * 5, 0.0], head=7.0)
    assert critical_path(spent, [1, 3, 2, 1], 3) == (9 + 3 + 5 + 9) + 10 + 7
    assert critical_path(spent, [1, 3, 2, 1], 2) == (9 + max(1 + 2, 3) + 5 + 9) + 10 + 7
    for devices, sizes in ((1, [1, 3, 2, 1]), (3, [1] * 7)):
        assert critical_path(spent, sizes, devices) == 33 + 10 + 7


@native
@pytest.mark.parametrize("weights", ["dense", "int8", "int4"])
@pytest.mark.parametrize("parallel", [1, 2, 3, 5])
def test_workers_compute_what_the_pieces_do(deep, parallel, weights):
    """A tree of several rows behind slots of two sequences, on one thread and on more, to the same bits."""
    model = LLM(deep, dtype="float32", backend="native", weights=weights).model
    sizes, outputs = [len(group) for group in groups(7, parallel)], []
    for threads in (None, 1, 2, 3):
        sequences = [Cache(model.config.layers, model.cache_dtype, model.device).sequence() for _ in range(2)]
        for sequence, text in zip(sequences, PROMPTS, strict=False):
            model.forward(Rows.of(sequence, text, 0), ())
            sequence.commit(len(text))
        mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
        spans = [Span(sequences[0], 0, 3, mask), Span(sequences[1], 3, 5)]
        starts = [len(text) for text in PROMPTS[:2]]
        places = torch.tensor([starts[0], starts[0] + 1, starts[0] + 1, starts[1], starts[1] + 1])
        rows = Rows(torch.tensor([5, 6, 7, 8, 9]), places, spans)
        assert runs_grouped(model, rows)
        if threads is None:
            outputs.append(fuzzy(model, rows, [1, 4], parallel))
            continue
        logits, spent = grouped(model, rows, [1, 4], sizes, threads)
        outputs.append(logits)
        assert min(spent.attention) > 0 and spent.head > 0
        assert [each > 0 for each in spent.feed_forward] == [size > 1 for size in sizes for _ in range(size)]
    reference, *computed = outputs
    torch.testing.assert_close(computed[0], reference, atol=1e-4 if weights == "dense" else 2e-2, rtol=1e-3)
    assert all(torch.equal(each, computed[0]) for each in computed)


@native
def test_one_layer_at_a_time_is_the_native_pass_to_the_bit(deep):
    model = LLM(deep, dtype="float32", backend="native").model
    sequences = [Cache(model.config.layers, model.cache_dtype, model.device).sequence() for _ in range(2)]
    expected = model.forward(Rows.of(sequences[0], TEXT, 0))
    assert torch.equal(grouped(model, Rows.of(sequences[1], TEXT, 0), None, [1] * 7)[0], expected)


@native
def test_drafts_are_the_same_on_any_number_of_workers(deep):
    llm, drafts = LLM(deep, dtype="float32", backend="native"), []
    for workers in (1, cores()):
        *_, proposed = recorded(llm, f"easyspec:parallel=3,confidence=0,length=5,workers={workers}")
        drafts.append(proposed)
    assert drafts[0] == drafts[1] and any(tokens for _, tokens in drafts[0])


def test_what_it_refuses(deep_llm):
    with pytest.raises(UserError, match="easyspec: parallel must be between 1 and 16"):
        deep_llm.engine.drafter("easyspec:parallel=0")
    with pytest.raises(UserError, match="easyspec: workers must be between 1 and"):
        deep_llm.engine.drafter(f"easyspec:workers={cores() + 1}")
