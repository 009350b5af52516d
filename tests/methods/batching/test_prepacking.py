"""Prepacking: packed prompts leave what each leaves alone, no matter what stands beside them, in few rows."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from hasten import SamplingParams
from hasten.cache import Cache
from hasten.errors import UserError
from hasten.methods.batching.padded import PaddedCache, extend
from hasten.methods.batching.prepacking import bins, length_sorted, padded, prepacked
from hasten.model import Decoder, Rows
from hasten.model.loading import load_model
from helpers import VOCABULARY

RNG = random.Random(0)
LENGTHS = [1, 1, 7, 7, 60, 33, 2, 19, 58, 12, 3, 41, 1, 25, 60, 9]
PROMPTS = [[RNG.randrange(2, VOCABULARY) for _ in range(length)] for length in LENGTHS]
WAYS = [prepacked, padded, length_sorted]


@pytest.fixture(scope="module")
def model(tiny) -> Decoder:
    return load_model(tiny, "float32", "cpu", "torch")


def alone(model: Decoder, prompt: list[int]) -> tuple[PaddedCache, torch.Tensor]:
    cache = PaddedCache.empty(model, 1)
    tokens = torch.tensor([prompt])
    hidden = extend(model, cache, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return cache, model.logits(hidden[:, -1], None)[0]


def same_slots(got: PaddedCache, wanted: PaddedCache, error: float = 1e-5) -> None:
    for ours, theirs in zip([*got.keys, *got.values], [*wanted.keys, *wanted.values], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=error)
    assert torch.equal(got.positions, wanted.positions) and bool(got.content.all())


def test_every_prompt_has_its_own_keys_and_values(model):
    for prompt, row in zip(PROMPTS, prepacked(model, PROMPTS).caches[0].rows(), strict=True):
        same_slots(row, alone(model, prompt)[0])
    held = prepacked(model, PROMPTS, hold_back=True)
    assert held.logits is None
    assert [row.slots for row in held.caches[0].rows()] == [length - 1 for length in LENGTHS]


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_the_engines(model, way):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    rows = Rows.of_several([(cache.sequence(), prompt, 0) for prompt in PROMPTS])
    wanted = model.forward(rows, [span.stop - 1 for span in rows.spans])
    torch.testing.assert_close(way(model, PROMPTS).logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("hold_back", [False, True])
def test_decoding_goes_on_as_alone(llm, model, hold_back):
    wanted = [
        each.choices[0].token_ids for each in llm.generate(PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))
    ]
    prefilled = prepacked(model, PROMPTS, hold_back=hold_back)
    decoded, cache = [[] for _ in PROMPTS], prefilled.caches[0]
    newest = [prompt[-1] for prompt in PROMPTS] if hold_back else prefilled.logits.argmax(-1).tolist()
    while True:
        if not hold_back or cache.slots > max(LENGTHS) - 1:
            for row, token in zip(decoded, newest, strict=True):
                row.append(token)
        if len(decoded[0]) == 12:
            break
        tokens = torch.tensor(newest).unsqueeze(1)
        hidden = extend(model, cache, tokens, torch.ones_like(tokens, dtype=torch.bool))
        newest = model.logits(hidden[:, -1], None).argmax(-1).tolist()
    assert decoded == wanted


def test_order_of_prompts_is_kept(model):
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    one, other = prepacked(model, PROMPTS), prepacked(model, [PROMPTS[each] for each in order])
    torch.testing.assert_close(other.logits, one.logits[order], rtol=0, atol=1e-5)


def test_neighbours_in_a_row_do_not_matter(model):
    """To the bit."""
    changed = [prompt if number != 9 else [5] * len(prompt) for number, prompt in enumerate(PROMPTS)]
    rows = [prepacked(model, each, capacity=120).caches[0].rows() for each in (PROMPTS, changed)]
    for number, (one, other) in enumerate(zip(*rows, strict=True)):
        if number != 9:
            same_slots(one, other, 0.0)


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying everything."""

    @cache
    def least(left: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not left:
            return len(rooms)
        first, rest = left[0], left[1:]
        tries = [least(rest, tuple(sorted((*rooms, capacity - first))))]
        for place, room in enumerate(rooms):
            if room >= first:
                tries.append(least(rest, tuple(sorted((*rooms[:place], room - first, *rooms[place + 1 :])))))
        return min(tries)

    return least(tuple(sorted(lengths, reverse=True)), ())


def test_rows_are_nearly_the_fewest():
    rng = random.Random(2)
    for _ in range(60):
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 7))]
        capacity = rng.randint(max(lengths), 16)
        rows = bins(lengths, capacity)
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
        assert len(rows) <= 11 / 9 * fewest(lengths, capacity) + 1


def test_padding_is_not_computed(model):
    lengths = [200] + [20] * 30
    prompts = [[7] * length for length in lengths]
    assert prepacked(model, prompts).processed <= 1.1 * sum(lengths)
    assert padded(model, prompts).processed == 200 * 31
    assert sum(lengths) < length_sorted(model, prompts).processed < 200 * 31
    equal = [[7] * 20] * 8
    assert prepacked(model, equal).processed == padded(model, equal).processed == 160


def test_what_cannot_be_packed_is_refused(model):
    with pytest.raises(UserError, match="cannot hold a prompt of 60"):
        prepacked(model, PROMPTS, capacity=50)
    for prompts in ([], [[3], []]):
        with pytest.raises(UserError, match="at least one token"):
            prepacked(model, prompts)
