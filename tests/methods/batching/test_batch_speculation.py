"""Batch speculation over a padded cache: plain decoding's tokens, its invariants, and bugs that the tests must see."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from hasten import SamplingParams
from hasten.methods.batching import padded, speculation
from hasten.methods.batching.eqspec import eqspec as run_eqspec
from hasten.methods.batching.exspec import Pooled, chosen_group
from hasten.methods.batching.exspec import exspec as run_exspec
from hasten.methods.batching.padded import PaddedCache, places
from hasten.methods.batching.rollback import rollback as run_rollback
from hasten.methods.batching.speculation import Batch, Pair, Text
from hasten.model import Decoder
from hasten.model.loading import load_model
from helpers import VOCABULARY, make_model

WAYS = [run_eqspec, run_exspec, run_rollback]


@pytest.fixture(scope="module")
def target(tiny) -> Decoder:
    return load_model(tiny, "float32", "cpu", "torch")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory) -> Decoder:
    """Often right, and not equally often in all texts."""
    folder = tmp_path_factory.mktemp("flawed")
    make_model(0.1).save_pretrained(folder)
    return load_model(folder, "float32", "cpu", "torch")


def texts(count: int = 16, temperature: float = 0.0) -> list[Text]:
    """Of lengths from 1 to 50, with limits that are reached in different rounds."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(1 + number * 13 % 50)]
        made.append(Text(prompt, len(prompt) + 4 + number * 5 % 17, temperature, number))
    return made


def plainly(target: Decoder, given: list[Text], ends: frozenset[int] = frozenset()) -> list[list[int]]:
    """Each alone, without a cache."""
    for text in given:
        while len(text.tokens) < text.limit:
            tokens = torch.tensor([text.tokens])
            hidden = padded.extend(target, PaddedCache.empty(target, 1), tokens, torch.ones_like(tokens).bool())
            text.tokens.append(speculation.chosen(text, target.logits(hidden[:, -1], None)[0], len(text.tokens)))
            if text.tokens[-1] in ends:
                break
    return [text.tokens for text in given]


@pytest.fixture(scope="module")
def wanted(target) -> list[list[int]]:
    return plainly(target, texts())


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("drafted", [1, 3, 5])
@pytest.mark.parametrize("way", WAYS)
def test_plain_decodings_tokens(target, drafter, wanted, way, drafted, batch):
    got = texts()
    pair = Pair(target, drafter)
    way(pair, got, drafted, batch)
    assert [text.tokens for text in got] == wanted
    if batch == 1:
        assert pair.counters.moved == 0


def test_plain_decoding_is_the_engines(llm, wanted):
    for text, tokens in zip(texts(), wanted, strict=True):
        params = SamplingParams(max_tokens=text.limit - len(text.tokens), ignore_eos=True)
        assert text.tokens + llm.generate([text.tokens], params)[0].choices[0].token_ids == tokens


@pytest.mark.parametrize("way", WAYS)
def test_ends_of_texts(target, drafter, wanted, way):
    """In different rounds, and within what is accepted; a prompt may contain them."""
    answers = [tokens[len(text.tokens) :] for text, tokens in zip(texts(), wanted, strict=True)]
    ends = frozenset({answers[1][2], answers[4][1], answers[7][0]})
    plain = plainly(target, texts(), ends)
    assert plain != wanted
    got = texts()
    way(Pair(target, drafter, ends), got, 5, 8)
    assert [text.tokens for text in got] == plain


@pytest.mark.parametrize("way", WAYS)
def test_sampling_does_not_depend_on_the_batch(target, drafter, way):
    plain = plainly(target, texts(8, 0.8))
    for batch in (1, 3, 8):
        got = texts(8, 0.8)
        way(Pair(target, drafter), got, 3, batch)
        assert [text.tokens for text in got] == plain


def test_invariants_hold_after_every_round(target, drafter):
    batch = Batch(Pair(target, drafter), texts(8))
    while batch.texts:
        before = {id(text): len(text.tokens) for text in batch.texts}
        batch.append(batch.round(4))
        assert all(len(text.tokens) > before[id(text)] for text in batch.texts)
        if not batch.texts:
            break
        for model, cache in ((target, batch.target), (drafter, batch.drafter)):
            assert cache.slots == batch.length - 1
            # Padding and content fill the rectangle; positions are contiguous; slots are those of a fresh prefill.
            assert (cache.slots - cache.content.sum(1)).tolist() == batch.padding()
            assert torch.equal(cache.positions, places(cache.content))
            fresh = speculation.prefill(model, batch.texts)
            assert torch.equal(cache.content, fresh.content)
            shown = cache.content[:, None, :, None]
            for ours, theirs in zip([*cache.keys, *cache.values], [*fresh.keys, *fresh.values], strict=True):
                torch.testing.assert_close(ours * shown, theirs * shown, rtol=0, atol=1e-5)


def test_the_rule_of_updates(target):
    """Rows move by the difference of paddings; those that got equally much do not."""
    rng = random.Random(3)
    for _ in range(300):
        count = rng.randint(1, 6)
        lengths = [rng.randint(1, 12) for _ in range(count)]
        news = [rng.randint(1, 5) for _ in range(count)]
        if rng.random() < 0.2:
            news = [news[0]] * count
        longest = max(lengths)
        cache = PaddedCache([], [], torch.ones(count, longest + 4).bool(), torch.arange(longest + 4).repeat(count, 1))
        pair = Pair(target, target)
        batch = Batch(pair, [Text([3] * length, 99) for length in lengths], (cache, cache))
        before = batch.padding()
        batch.append([[4] * new for new in news])
        after = batch.padding()
        assert min(after) == 0
        shifts = [now - then for now, then in zip(after, before, strict=True)]
        assert shifts == [batch.length - longest - new for new in news]
        assert pair.counters.moved == any(shifts)
        for row, (length, new) in enumerate(zip(lengths, news, strict=True)):
            kept = batch.target.positions[row, after[row] :].tolist()
            assert kept == list(range(before[row], before[row] + length + new - 1))


def bonus_of_the_drafter(patch):
    original = speculation.accepted
    patch.setattr(
        speculation, "accepted", lambda draft, said: draft[: len(original(draft, said))] or original(draft, said)
    )


def rejected_tokens_stay(patch):
    aligned = PaddedCache.aligned

    def late(self, pieces):
        return aligned(self, [(row, self.slots - (stop - start), self.slots) for row, start, stop in pieces])

    patch.setattr(PaddedCache, "aligned", late)


def rows_are_not_moved(patch):
    aligned = PaddedCache.aligned

    def cut(self, pieces):
        longest = max(stop - start for _, start, stop in pieces)
        moved = aligned(self, pieces)
        still = aligned(self, [(row, 0, longest) for row, _, _ in pieces])
        return replace(still, content=moved.content, positions=moved.positions)

    patch.setattr(PaddedCache, "aligned", cut)


def positions_count_padding(patch):
    patch.setattr(padded, "places", lambda content: torch.arange(content.shape[1]).expand(len(content), -1))


def padding_is_content(patch):
    original = padded.left_padded

    def blind(given, model):
        tokens, content = original(given, model)
        return tokens, torch.ones_like(content)

    patch.setattr(speculation, "left_padded", blind)


BUGS = [bonus_of_the_drafter, rejected_tokens_stay, rows_are_not_moved, positions_count_padding, padding_is_content]


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_seen(target, drafter, wanted, monkeypatch, bug):
    """With several rows each of them; with one, those that have nothing to do with others."""
    bug(monkeypatch)
    seen = {}
    for batch in (1, 8):
        got = texts()
        run_eqspec(Pair(target, drafter), got, 5, batch)
        seen[batch] = [text.tokens for text in got] != wanted
    assert seen == {1: bug in (bonus_of_the_drafter, rejected_tokens_stay), 8: True}


def test_equal_lengths_never_move(target):
    """With a drafter that is always right and prompts of one length."""
    pair = Pair(target, target)
    run_exspec(pair, [Text([number + 3] * 6, 30) for number in range(8)], 3, 4)
    assert pair.counters.grouped == pair.counters.rounds and pair.counters.moved == 0


def test_appending_more_than_the_slowest_row_pays(target, drafter):
    rounds = []
    for way in (run_eqspec, run_rollback):
        pair = Pair(target, drafter)
        way(pair, [replace(text, limit=len(text.tokens) + 24) for text in texts(8)], 5, 8)
        rounds.append(pair.counters.rounds)
    assert rounds[0] < rounds[1]


def test_nobody_waits_for_ever():
    def pooled(length: int, waited: int) -> Pooled:
        return Pooled(Text([1] * length, 99), None, None, waited)

    pool = [pooled(9, 3), pooled(5, 0), pooled(5, 0)]
    assert chosen_group(pool, 2, 4) == pool[1:]
    assert chosen_group(pool, 2, 3)[0] is pool[0]
    assert chosen_group(pool[:2], 2, 9) == pool[:2]
