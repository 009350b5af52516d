"""The native step: the same bits for a row whatever stands beside it, on every instruction set, and clear refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache
from hasten.model import Decoder, Rows, Span, load_model
from hasten.model.native import refusal
from hasten.model.native.backend import LIBRARY, SHORT

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Any]) -> Decoder:
    checkpoint = make_checkpoint("llama", intermediate_size=77)
    return load_model(checkpoint.folder, dtype="float32", device="cpu", backend="native")


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def behind(model: Decoder, cache: Cache, count: int, seed: int = 0):
    """A sequence that holds so many tokens."""
    sequence = cache.sequence()
    if count:
        model.forward(Rows.of(sequence, tokens(count, seed), 0))
        sequence.commit(count)
    return sequence


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_beside_any_others(model, threads):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    text, known = tokens(SHORT, 1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sequence = behind(model, cache, 37)
        whole = model.forward(Rows.of(sequence, text, 37))
        for rows in (1, 2, 3, 5, 8, 12, 13, 24, 31, 63):
            assert torch.equal(model.forward(Rows.of(sequence, text[:rows], 37)), whole[:rows])
        # One by one, as plain decoding does.
        for row in range(20):
            assert torch.equal(model.forward(Rows.of(sequence, text[row : row + 1], 37 + row))[0], whole[row])
            sequence.commit(1)
    finally:
        torch.set_num_threads(known)


def test_neighbours_change_no_bit(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    one, other = behind(model, cache, 20), behind(model, cache, 50, seed=5)
    alone = model.forward(Rows.of(one, tokens(4, 2), 20))
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    spans = [Span(one, 0, 4), Span(other, 4, 7, mask)]
    positions = torch.tensor([20, 21, 22, 23, 50, 51, 51])
    packed = model.forward(Rows(torch.tensor([*tokens(4, 2), 7, 8, 9]), positions, spans))
    assert torch.equal(packed[:4], alone)
    # A long prompt beside them is PyTorch's, and changes nothing either.
    fresh = cache.sequence()
    long = tokens(SHORT + 9, 3)
    spans = [Span(fresh, 0, len(long)), Span(one, len(long), len(long) + 4)]
    positions = torch.tensor([*range(len(long)), 20, 21, 22, 23])
    wanted = [len(long) + 3, 0, len(long) - 1, len(long)]
    mixed = model.forward(Rows(torch.tensor([*long, *tokens(4, 2)]), positions, spans), wanted)
    assert torch.equal(mixed[[3, 0]], alone[[0, 3]])
    sequence = cache.sequence()
    expected = model.forward(Rows.of(sequence, long, 0))
    torch.testing.assert_close(mixed[[1, 2]], expected[[0, -1]], atol=1e-4, rtol=0)


def test_a_tree_gives_each_path_its_chain(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    sequence = behind(model, cache, 11)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    ids, positions = torch.tensor([3, 4, 5, 6]), torch.tensor([11, 12, 12, 13])
    tree = model.forward(Rows(ids, positions, [Span(sequence, 0, 4, mask)]))
    assert torch.equal(model.forward(Rows.of(sequence, [3, 4], 11)), tree[:2])
    assert torch.equal(model.forward(Rows.of(sequence, [3, 5, 6], 11)), tree[[0, 2, 3]])


@pytest.mark.parametrize("method", ["ngram:minimum=1", "draft-model:confidence=0", "suffix", "token-recycling"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_methods_give_plain_decodings_tokens(tiny, method, temperature):
    llm = LLM(tiny, dtype="float32", backend="native")
    prompts = [[2, 3, 4] * 4, [9] * 7, list(range(10, 30))]
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    expected = [each.token_ids for each in llm.generate(prompts, params, "plain")]
    for batch in (prompts, prompts[:1], prompts[1:]):
        got = llm.generate(batch, params, method)
        assert [each.token_ids for each in got] == [expected[prompts.index(prompt)] for prompt in batch]
    assert llm.engine.cache.used_bytes == 0


SCRIPT = """
import sys, torch
from hasten.cache import Cache
from hasten.model import Rows, load_model
torch.set_num_threads(2)
model = load_model(sys.argv[1], dtype="float32", device="cpu", backend="native")
cache = Cache(model.config.layers, model.cache_dtype, model.device)
torch.save(model.forward(Rows.of(cache.sequence(), list(range(2, 40)), 0)), sys.argv[2])
"""


@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_pytorch(make_checkpoint, tmp_path, kernels):
    checkpoint = make_checkpoint("qwen3")
    out = tmp_path / "logits.pt"
    environment = os.environ | {"HASTEN_NATIVE": kernels}
    subprocess.run([sys.executable, "-c", SCRIPT, str(checkpoint.folder), str(out)], env=environment, check=True)
    torch.testing.assert_close(torch.load(out), checkpoint.logits(list(range(2, 40))), atol=1e-4, rtol=0)


def test_rows_that_are_not_there_are_refused(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    with pytest.raises(IndexError):
        model.forward(Rows.of(cache.sequence(), [3, 4], 0), [2])


def test_refusals(make_checkpoint, model):
    config = model.config
    assert refusal(config, torch.float32, torch.device("cpu")) is None
    assert "float32" in str(refusal(config, torch.bfloat16, torch.device("cpu")))
    window = make_checkpoint("mistral", sliding_window=7)
    with pytest.raises(UserError, match="windows"):
        load_model(window.folder, dtype="float32", device="cpu", backend="native")
    with pytest.raises(UserError, match="backend must be"):
        load_model(window.folder, backend="fast")
