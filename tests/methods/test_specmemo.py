"""SpecMemo: never over the budget, refusal below plain decoding's need, the same tokens, everything given back."""

from __future__ import annotations

import pytest

from hasten import SamplingParams, UserError
from hasten.cache import Cache
from hasten.engine import Draft, Engine, Limits, Target
from hasten.engine.creation import create
from hasten.engine.memory import logits_bytes, mask_bytes
from hasten.methods.drafters.specmemo import SpecMemo, SpecMemoParameters
from helpers import CONTEXT, PeakBytes

PROMPTS = [[2, 3, 4] * 4, [9] * 7, list(range(10, 30)), [5, 6] * 9]
PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)
TREE = "token-recycling"


def cache_of(llm) -> Cache:
    return Cache(llm.model.config.layers, llm.model.cache_dtype, llm.model.device)


def plain_need(llm, prompt: int, output: int) -> int:
    """Bytes of plain decoding, from first principles: keys and values of every layer, positions, a row of logits."""
    layers = llm.model.config.layers
    slot = 8 + sum(2 * layer.slots.heads * layer.slots.key_width * llm.model.cache_dtype.itemsize for layer in layers)
    return max(prompt + output, 64) * slot + 4 * llm.model.config.vocab_size


def decode(llm, drafter, prompts=PROMPTS, params=PARAMS, **limits):
    """Requests, the engine, and the most bytes of any step, with the drafter's own."""
    engine = Engine(llm.model, llm.tokenizer, limits=Limits(**limits))
    requests = [each for prompt in prompts for each in engine.add(prompt, params, drafter)]
    worst = 0
    while engine.busy:
        engine.step()
        worst = max(worst, engine.ledger.last.total + drafter.memory_bytes)
    return requests, engine, worst


def make(llm, budget: int, drafter: str = TREE, nodes: int = 64) -> SpecMemo:
    return SpecMemo(
        Target(llm.model, llm.tokenizer, llm.target_folder), SpecMemoParameters(str(budget), drafter, nodes)
    )


@pytest.fixture(scope="module")
def llm(llm):
    llm.target_folder = llm.engine.target.folder
    return llm


@pytest.fixture
def expected(llm):
    return [generation.token_ids for generation in llm.generate(PROMPTS, PARAMS, "plain")]


@pytest.mark.parametrize("drafter", [TREE, "ngram", "suffix", "draft-model", "copyspec/draft-model:width=2", "auto"])
@pytest.mark.parametrize("budget", [70_000, 120_000, 150_000, 200_000, 300_000, 500_000, 10**8])
def test_within_any_budget_the_same_tokens(llm, expected, drafter, budget):
    memo = make(llm, budget, drafter)
    requests, engine, worst = decode(llm, memo)
    assert worst <= budget
    assert [request.output for request in requests] == expected
    assert engine.cache.used_bytes == 0 and memo.reserved == 0


def test_the_least_budget_is_that_of_plain_decoding(llm, expected):
    need = plain_need(llm, len(PROMPTS[2]), PARAMS.max_tokens)
    requests, _, worst = decode(llm, make(llm, need), PROMPTS[2:3])
    assert requests[0].output == expected[2] and worst <= need
    with pytest.raises(UserError, match="lower max_tokens or raise the budget"):
        decode(llm, make(llm, need - 1), PROMPTS[2:3])


def test_a_refused_request_leaves_nothing(llm, expected):
    memo = make(llm, plain_need(llm, 12, 60))
    engine = Engine(llm.model, llm.tokenizer)
    with pytest.raises(UserError, match="needs"):
        engine.add([2] * 200, SamplingParams(max_tokens=50), memo)
    assert memo.reserved == 0 and not memo._groups and not engine.busy
    (request,) = engine.add(PROMPTS[0], PARAMS, memo)
    list(engine.run())
    assert request.output == expected[0]


@pytest.mark.parametrize("nodes", [1, 4, 13])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_prediction_equals_ledger(llm, nodes, batch):
    """Step by step, to the byte: what is reserved for the cache, and what drafts of that size were said to take."""
    memo = make(llm, 10**8, "draft-model:confidence=0,width=2,length=6", nodes)
    drafts: list[Draft] = []
    propose_all = memo.propose_all

    def watched(requests, budgets):
        drafts[:] = propose_all(requests, budgets)
        return drafts

    memo.propose_all = watched
    engine = Engine(llm.model, llm.tokenizer)
    for prompt in PROMPTS[:1] * batch:
        engine.add(prompt, PARAMS, memo)
    block, vocabulary, full = cache_of(llm).sequence_bytes(len(PROMPTS[0]) + 60), llm.model.config.vocab_size, 0
    while engine.busy:
        drafts.clear()
        engine.step()
        if len(drafts) == batch:
            last = engine.ledger.last
            assert last.kv == batch * block
            assert last.logits == sum(logits_bytes(len(draft) + 1, vocabulary) for draft in drafts)
            assert last.masks == sum(mask_bytes(len(draft)) for draft in drafts if not draft.is_chain)
            full += all(len(draft) == nodes for draft in drafts)
    assert full > 3


def test_the_draft_is_as_large_as_fits(llm):
    """A drafter that always fills its budget shows the solver's choice: one byte less, one node less."""
    vocabulary, slots = llm.model.config.vocab_size, len(PROMPTS[0]) + 60
    nodes = 7
    base = cache_of(llm).sequence_bytes(slots) + logits_bytes(1, vocabulary)
    exact = base + logits_bytes(nodes, vocabulary) + mask_bytes(nodes)
    for budget, most in ((exact, nodes), (exact - 1, nodes - 1)):
        memo = make(llm, budget, "ngram", nodes=32)
        memo._admitted.add(0)
        engine = Engine(llm.model, llm.tokenizer)
        requests = engine.add(PROMPTS[0], PARAMS, memo)
        assert memo.free == budget - base
        assert memo._nodes(memo._inner, requests) == most


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 9},
        {"temperature": 0.8, "acceptance": "max"},
        {"temperature": 0.8, "acceptance": "max", "top_p": 0.9},
        {"temperature": 0.8, "acceptance": "typical"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "drafter",
    [
        "ngram:minimum=1",
        TREE,
        "stand:minimum=1,maximum=2",
        "draft-model:width=3",
        "dyspec/ngram:minimum=1",
        "medusa:sized=false",
        "hydra:sized=false",
    ],
)
def test_all_that_exists_at_once_is_within_the_budget(llm, drafter, settings):
    """Measured: every tensor that is made while requests run, from the cache to what sampling takes for a while."""
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=1, **settings)
    held, need = make(llm, 10**8, drafter).memory_bytes, 2 * plain_need(llm, len(PROMPTS[0]), 60)
    accepted = 0
    for extra in (20_000, 60_000, 200_000, 10**6):
        memo = make(llm, held + need + extra, drafter, nodes=32)
        engine = Engine(llm.model, llm.tokenizer)
        requests = [engine.add(PROMPTS[number], params, memo)[0] for number in (0, 3)]
        with PeakBytes() as peak:
            list(engine.run())
        assert held + peak.most <= memo.budget
        accepted += sum(request.statistics.accepted for request in requests)
    assert accepted


def test_more_bytes_never_mean_smaller_drafts(llm):
    table = make(llm, 10**8, "token-recycling:nodes=64").memory_bytes
    need = plain_need(llm, len(PROMPTS[0]), 60)
    rows = []
    for extra in (0, table, table + 2000, table + 5000, table + 12000, 10**8):
        requests, _, _ = decode(llm, make(llm, need + extra, "token-recycling:nodes=64"), PROMPTS[:1])
        rows.append(requests[0].statistics.rows / requests[0].statistics.steps)
    assert rows == sorted(rows) and rows[-1] > rows[2] > rows[0] == 1


def test_requests_wait_for_room(llm, expected):
    alone = plain_need(llm, 20, 60)
    memo = make(llm, int(2.2 * alone), "ngram")
    engine = Engine(llm.model, llm.tokenizer)
    requests = [engine.add(prompt, PARAMS, memo)[0] for prompt in PROMPTS]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most == 2
    assert [request.output for request in requests] == expected


def test_choices_of_a_prompt_share_its_cache(llm):
    params = SamplingParams(n=3, max_tokens=60, ignore_eos=True, temperature=0.8, seed=1)
    alone, _, _ = decode(llm, create("plain", Target(llm.model, llm.tokenizer)), PROMPTS[2:3], params)
    for budget in (plain_need(llm, 20, 60) * 3, 10**8):
        requests, engine, worst = decode(llm, make(llm, budget, "ngram"), PROMPTS[2:3], params, sequences=2)
        assert [request.output for request in requests] == [request.output for request in alone]
        assert worst <= budget and engine.cache.used_bytes == 0


ENDLESS = SamplingParams(ignore_eos=True)
"""As much as the context holds."""


@pytest.fixture(scope="module")
def endless(llm):
    return [generation.token_ids for generation in llm.generate(PROMPTS, ENDLESS, "plain")]


@pytest.mark.parametrize("drafter", [TREE, "ngram", "draft-model"])
@pytest.mark.parametrize("share", [1.01, 1.3, 1.9, 2.6, 10])
@pytest.mark.parametrize("ahead", [16, 128])
def test_without_max_tokens_it_reserves_as_the_text_grows(llm, endless, monkeypatch, drafter, share, ahead):
    """Texts that fill the context, several at a time where the budget does not hold as many to the end."""
    monkeypatch.setattr("hasten.methods.drafters.specmemo.AHEAD", ahead)
    whole = plain_need(llm, 0, CONTEXT)
    memo = make(llm, int(share * whole), drafter)
    requests, engine, worst = decode(llm, memo, PROMPTS, ENDLESS)
    assert worst <= memo.budget and engine.cache.peak_bytes <= memo.budget
    assert [request.output for request in requests] == endless
    assert engine.cache.used_bytes == 0 and memo.reserved == 0 and not memo._groups and not memo._begun


def test_texts_that_grow_run_together(llm, endless, monkeypatch):
    """Neither has the budget for itself, and both come to their end, though it does not hold both of them whole."""
    monkeypatch.setattr("hasten.methods.drafters.specmemo.AHEAD", 32)
    memo = make(llm, int(1.5 * plain_need(llm, 0, CONTEXT)), "ngram")
    engine, together = Engine(llm.model, llm.tokenizer), 0
    requests = [engine.add(prompt, ENDLESS, memo)[0] for prompt in PROMPTS[:2]]
    bounded = engine.add(PROMPTS[2], PARAMS, memo)[0]
    while engine.busy:
        engine.step()
        assert engine.ledger.last.total <= memo.budget
        together += len(engine.scheduler.running) > 1
    read = sum(request.statistics.prompt_rows - request.prompt_length for request in requests)
    assert together > 40 and 0 < read < 4 * CONTEXT
    assert bounded.statistics.prompt_rows == bounded.prompt_length
    assert [request.output for request in requests] == endless[:2]
    assert bounded.output == llm.generate([PROMPTS[2]], PARAMS, "plain")[0].token_ids


def test_only_a_text_that_outgrows_the_budget_fails(llm, endless):
    """Its tokens until then are right, and others go on."""
    need = plain_need(llm, 0, 150)
    memo = make(llm, need, "ngram")
    engine = Engine(llm.model, llm.tokenizer)
    (long,), (short,) = engine.add(PROMPTS[0], ENDLESS, memo), engine.add(PROMPTS[1], PARAMS, memo)
    with pytest.raises(UserError, match=r"specmemo: a text of 151 tokens needs .* bytes, the budget is"):
        list(engine.run())
    assert long.finish_reason == "error" and long.output == endless[0][: 151 - len(PROMPTS[0])]
    list(engine.run())
    assert short.output == llm.generate([PROMPTS[1]], PARAMS, "plain")[0].token_ids
    assert engine.cache.used_bytes == 0 and memo.reserved == 0
    with pytest.raises(UserError, match="specmemo: a text of 200 tokens needs"):
        engine.add([2] * 200, ENDLESS, memo)
    assert not memo._groups and not engine.busy


def test_choices_that_grow_give_back_each_for_itself(llm):
    params = SamplingParams(n=3, ignore_eos=True, temperature=0.8, seed=1)
    alone, _, _ = decode(llm, create("plain", Target(llm.model, llm.tokenizer)), PROMPTS[2:3], params)
    for share in (1.2, 2.2, 10):
        memo = make(llm, int(share * plain_need(llm, 0, CONTEXT)), "ngram")
        requests, engine, worst = decode(llm, memo, PROMPTS[2:3], params)
        assert [request.output for request in requests] == [request.output for request in alone]
        assert worst <= memo.budget and engine.cache.used_bytes == 0


def test_a_text_that_grows_in_a_cache_with_a_limit(llm, endless):
    """Whichever of the two is the tighter one."""
    whole = plain_need(llm, 0, CONTEXT)
    for limit, share in ((1.2, 3), (2, 1.2), (1.05, 1.05)):
        memo = make(llm, int(share * whole), "ngram")
        engine = Engine(llm.model, llm.tokenizer, cache_bytes=int(limit * whole))
        requests = [engine.add(prompt, ENDLESS, memo)[0] for prompt in PROMPTS]
        list(engine.run())
        assert [request.output for request in requests] == endless


def test_a_drafter_in_the_way_is_given_up_and_comes_back(llm, expected):
    table = make(llm, 10**8).memory_bytes
    alone = plain_need(llm, 20, 60)
    memo = make(llm, 2 * alone + table // 2)
    assert memo.memory_bytes == table
    requests, _, worst = decode(llm, memo)
    assert worst <= memo.budget
    assert [request.output for request in requests] == expected
    decode(llm, memo, PROMPTS[:1])
    assert memo.memory_bytes == table


def test_no_drafter_is_made_within_a_step(llm, expected, monkeypatch):
    """It may have to be loaded: that is done where a request is added, once there is room beside all that wait."""
    table, alone = make(llm, 10**8).memory_bytes, plain_need(llm, 20, 60)
    memo = make(llm, 2 * alone + table // 2)
    engine, made, steps = Engine(llm.model, llm.tokenizer), [], 0
    fresh = memo._fresh
    monkeypatch.setattr(memo, "_fresh", lambda: made.append(steps) or fresh())
    requests = [engine.add(prompt, PARAMS, memo)[0] for prompt in PROMPTS]
    assert memo.memory_bytes == table
    while engine.busy:
        before = len(made)
        engine.step()
        assert len(made) == before
        steps += 1
    assert memo.memory_bytes == 0 and not made
    # Two leave room for it only one after the other.
    again = [engine.add(prompt, PARAMS, memo)[0] for prompt in PROMPTS[:2]]
    assert memo.memory_bytes == table and len(made) == 1
    list(engine.run())
    assert [request.output for request in requests + again] == expected + expected[:2]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"budget": "much"}, "budget must be a size"),
        ({"nodes": 0}, "nodes must be"),
        ({"drafter": "specmemo"}, "its own drafter"),
        ({"drafter": "nope"}, "unknown method"),
    ],
)
def test_bad_parameters(parameters, sentence):
    with pytest.raises(UserError, match=sentence):
        SpecMemoParameters(**parameters)


@pytest.mark.parametrize("spec", ["specmemo+ngram", "ngram+specmemo:budget=1MB", "auto:candidates=specmemo"])
def test_it_stands_alone(llm, spec):
    with pytest.raises(UserError, match="specmemo"):
        create(spec, Target(llm.model, llm.tokenizer))
