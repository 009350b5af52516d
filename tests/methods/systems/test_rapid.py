"""RAPID: chunks that a retriever finds, in their order; the target's tokens whatever the drafter has read."""

from __future__ import annotations

import sys
from math import log
from types import SimpleNamespace

import numpy as np
import pytest

from hasten import SamplingParams, UserError
from hasten.engine import Engine
from hasten.methods.systems import retrieval
from hasten.methods.systems.retrieval import BM25, shortened
from helpers import same

LONG = [number * 37 % 140 + 2 for number in range(180)]
SPEC = "rapid:least=64,query=12,chunk=8,confidence=0,length=4"


def test_bm25_by_hand():
    """Three chunks, one of them twice as long; terms of none of them count for nothing."""
    chunks, query = [[1, 2], [1, 1, 3, 4], [5, 6]], [1, 3, 9]
    one, three = log(1 + 1.5 / 2.5), log(1 + 2.5 / 1.5)
    usual = 8 / 3

    def term(count: int, length: int) -> float:
        return count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / usual))

    assert BM25().scores(chunks, query) == pytest.approx([one * term(1, 2), one * term(2, 4) + three * term(1, 4), 0.0])


def test_what_is_kept_is_in_order():
    prompt = [*range(10), *[50] * 4, *[7, 60, 60, 60], *[51] * 4, *[8, 9, 60, 60], 7, 8]
    left = shortened(prompt, BM25(), 20, 4, 10, 2)
    assert left == [*range(10), *[7, 60, 60, 60], *[8, 9, 60, 60], 7, 8]
    assert shortened(prompt, BM25(), len(prompt), 4, 10, 2) == prompt
    # Nothing has to do with the question: what stands last stays.
    assert shortened([1, *[2] * 9, 3], BM25(), 5, 3, 1, 1) == [1, 2, 2, 2, 3]


def test_embeddings_are_no_terms():
    assert shortened([1, -1, -1, 5, 5, 6, -1, 5], BM25(), 4, 2, 1, 1) == [1, 5, 5, 5]


@pytest.mark.parametrize("model", ["self", "auto"])
@pytest.mark.parametrize("kind", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_tokens_are_the_target_s(llm, model, kind):
    asked, prompts = SamplingParams(max_tokens=24, logprobs=2, **kind), [LONG, LONG[:50], LONG[60:], LONG[::-1]]
    expected = llm.generate(prompts, asked, "plain")
    got = llm.generate(prompts, asked, f"{SPEC},model={model}")
    for mine, theirs in zip(got, expected, strict=True):
        same(mine.choices[0], theirs.choices[0])
    # A prompt that is not shortened is drafted by the target itself: all is right.
    figures = got[1].choices[0].statistics
    assert model == "auto" or figures.accepted > 10


def test_the_drafter_reads_the_short_prompt(llm):
    """Its cache holds that and the answer, and its drafts are what the model says behind these."""
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    drafter, drafts = engine.drafter(SPEC)[1], []
    propose_all = drafter.propose_all

    def note(requests, budgets):
        proposed = propose_all(requests, budgets)
        drafts.append((list(requests[0].output), proposed[0].tokens))
        return proposed

    drafter.propose_all = note
    request = engine.add(LONG, SamplingParams(max_tokens=20, ignore_eos=True), SPEC)[0]
    for _ in range(4):
        engine.step()
    short = shortened(LONG, BM25(), 64, 8, 32, 12)
    assert len(short) <= 64 < len(LONG)
    assert drafter._sequences[request.id].length == len(short) + len(drafts[-1][0])
    assert drafter.memory_bytes < 2 * drafter.cache.sequence_bytes(len(short) + 20 + 64)
    for output, tokens in drafts:
        alone = llm.generate([short + output], SamplingParams(max_tokens=len(tokens), ignore_eos=True), "plain")
        assert alone[0].token_ids == tokens
    while engine.busy:
        engine.step()
    assert drafter.cache.used_bytes == 0 and drafter.memory_bytes == 0


def test_an_encoder_chooses_where_one_is_installed(llm, monkeypatch):
    """Cosine of embeddings: here of counts of characters."""

    def encode(texts, normalize_embeddings):
        assert normalize_embeddings
        table = np.array([[text.count(chr(code)) for code in range(32, 127)] for text in texts], float) + 1e-9
        return table / np.linalg.norm(table, axis=1, keepdims=True)

    made = SimpleNamespace(SentenceTransformer=lambda name: SimpleNamespace(encode=encode, name=name))
    monkeypatch.setitem(sys.modules, "sentence_transformers", made)
    retrieval._encoder.cache_clear()
    asked = SamplingParams(max_tokens=8, ignore_eos=True)
    got = llm.generate([LONG], asked, f"{SPEC},encoder=some")[0]
    assert got.token_ids == llm.generate([LONG], asked, "plain")[0].token_ids
    retrieval._encoder.cache_clear()


def test_what_it_refuses(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="needs the package sentence-transformers"):
        llm.engine.drafter("rapid:encoder=some")
    for wrong in ("query=0", "chunk=0", "ratio=0", "least=60"):
        with pytest.raises(UserError, match=f"rapid: {wrong.partition('=')[0]} must"):
            llm.engine.drafter(f"rapid:{wrong}")


@pytest.mark.parametrize("kind", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_transfer_judges_by_what_was_moved(llm, kind):
    """Without strength, greedily, the target's tokens; with it, others, for which the drafter is the reason."""
    asked, spec = SamplingParams(max_tokens=40, ignore_eos=True, **kind), SPEC.replace("rapid", "rapid-transfer")
    plain = llm.generate([LONG], asked, "plain")[0].token_ids
    still, far = (llm.generate([LONG], asked, f"{spec},strength={strength}")[0] for strength in (0, 60))
    assert far.token_ids != plain
    assert len(far.token_ids) == 40 and far.choices[0].statistics.accepted > still.choices[0].statistics.accepted
    if not kind:
        assert still.token_ids == plain
    again = llm.generate([LONG, LONG[:70]], asked, f"{spec},strength=60")[0]
    assert again.token_ids == far.token_ids


def test_transfer_refuses_trees(llm):
    with pytest.raises(UserError, match="rapid-transfer: width must be 1"):
        llm.engine.drafter("rapid-transfer:width=2")
    with pytest.raises(UserError, match="rapid-transfer: strength must be"):
        llm.engine.drafter("rapid-transfer:strength=-1")
