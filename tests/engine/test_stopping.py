"""Where output ends: stop strings at every split of a text into tokens, budgets, end of text, and what may be shown."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from hasten import SamplingParams
from hasten.engine.stopping import Stopper

END = 99


class Pieces:
    """A tokenizer whose token i is the i-th piece of bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **options: bool) -> str:
        return b"".join(self.pieces[token] for token in ids if token != END).decode(errors="replace")


def splits(text: bytes) -> list[list[bytes]]:
    """All 2^(length - 1) ways to cut a text into pieces."""
    ways = []
    for cuts in range(1 << (len(text) - 1)):
        borders = [0, *(at for at in range(1, len(text)) if cuts >> (at - 1) & 1), len(text)]
        ways.append([text[start:stop] for start, stop in pairwise(borders)])
    return ways


def run(pieces: list[bytes], per_step: int, stop=(), room: int = 100, tail=(), **settings):
    """Feed all pieces, `per_step` at once: (tokens kept, shown text, stopper)."""
    stopper = Stopper(SamplingParams(stop=stop, **settings), [END], Pieces(pieces), room, read=True)
    ids = [*range(len(pieces)), *tail]
    kept, shown = 0, ""
    for start in range(0, len(ids), per_step):
        step = ids[start : start + per_step]
        kept += stopper.accept(step)
        shown += stopper.fresh()
        if stopper.reason is not None:
            break
    return kept, shown, stopper


@pytest.mark.parametrize("per_step", [1, 2, 3, 20])
@pytest.mark.parametrize("text", ["xSTOPyz", "xSTSTOPy", "STOPxSTO", "xySTOP"])
def test_every_split(text, per_step):
    at = text.index("STOP")
    for pieces in splits(text.encode()):
        kept, shown, stopper = run(pieces, per_step, "STOP")
        assert stopper.reason == "stop"
        assert stopper.cut == at
        assert shown == text[:at]
        # Up to the token that completes the string, and no further.
        assert len(b"".join(pieces[: kept - 1])) < at + 4 <= len(b"".join(pieces[:kept]))


def test_never_shown_too_soon():
    for pieces in splits(b"abcabcabd!"):
        stopper = Stopper(SamplingParams(stop=("abcabd", "zz")), [], Pieces(pieces), 100, read=True)
        shown = ""
        for token in range(len(pieces)):
            stopper.accept([token])
            shown += stopper.fresh()
            assert "abc".startswith(shown)
            if stopper.reason:
                break
        assert shown == "abc"


@pytest.mark.parametrize("per_step", [1, 2, 20])
def test_what_was_held_back_is_shown_in_the_end(per_step):
    for pieces in splits(b"halfSTO"):
        count = len(pieces)
        for settings, tail, reason in (
            ({"max_tokens": count}, (), "length"),
            ({}, (END,), "stop"),
        ):
            kept, shown, stopper = run(pieces, per_step, "STOP", tail=tail, **settings)
            assert (kept, shown, stopper.reason) == (count + len(tail), "halfSTO", reason)
            assert stopper.cut is None


def test_the_earliest_of_several_ends_the_text():
    _, shown, stopper = run([b"abcdef"], 1, ("ef", "cd", "xyz"))
    assert (shown, stopper.cut) == ("ab", 2)
    _, shown, stopper = run([b"a", b"b", b"cd", b"ef"], 4, ("bcdef", "c"))
    assert (shown, stopper.cut) == ("ab", 2)
    _, shown, stopper = run([b"a", b"b", b"c", b"d"], 1, ("cd", "bcd"))
    assert (shown, stopper.cut) == ("a", 1)


def test_multi_byte_stop_strings():
    text = "naïve 😀 text"
    for stop in ("ï", "😀", "e 😀 t"):
        for pieces in ([text.encode()], [bytes([byte]) for byte in text.encode()]):
            for per_step in (1, 3, 50):
                _, shown, stopper = run(pieces, per_step, stop)
                assert shown == text[: text.index(stop)]
                assert stopper.reason == "stop"


@pytest.mark.parametrize("tail, settings", [((), {"max_tokens": 2}), ((END,), {})])
def test_stop_string_beside_half_a_character(tail, settings):
    """The token that completes it also begins a character that never ends."""
    kept, shown, stopper = run([b"abST", b"OP\xe2"], 1, "STOP", tail=tail, **settings)
    assert (shown, stopper.cut, stopper.reason) == ("ab", 2, "stop")
    assert kept == 2 + len(tail)


def test_end_of_text():
    for per_step in (1, 2, 5):
        kept, shown, stopper = run([b"a", b"b"], per_step, tail=[END, 0, 1])
        assert (kept, shown, stopper.reason) == (3, "ab", "stop")
    kept, shown, stopper = run([b"a", b"b"], 2, tail=[END, 0, 1], ignore_eos=True)
    assert (kept, shown, stopper.reason) == (5, "abab", None)


@pytest.mark.parametrize("budget, room, expected", [(3, 100, 3), (None, 4, 4), (9, 4, 4), (4, 9, 4), (1, 1, 1)])
def test_budget_and_room(budget, room, expected):
    for per_step in (1, 2, 3, 20):
        kept, shown, stopper = run([b"a"] * 10, per_step, room=room, max_tokens=budget)
        assert (kept, shown, stopper.reason) == (expected, "a" * expected, "length")
        assert stopper.left == 0


def test_end_of_text_as_the_last_token_of_the_budget():
    kept, _, stopper = run([b"a"], 2, tail=[END], max_tokens=2)
    assert (kept, stopper.reason) == (2, "stop")


def test_without_a_tokenizer():
    stopper = Stopper(SamplingParams(max_tokens=3), [END], None, 100, read=True)
    assert stopper.accept([5, 6]) == 2
    assert stopper.fresh() == ""
    assert stopper.left == 1
    assert stopper.accept([7, 8]) == 1
    assert stopper.reason == "length"


class WithSpecial(Pieces):
    """Token 0 is special, with the text `<|end|>`."""

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {0: AddedToken("<|end|>", special=True), 1: AddedToken("plain", special=False)}

    def decode(self, ids: list[int], skip_special_tokens: bool, **how: bool) -> str:
        return super().decode([token for token in ids if token or not skip_special_tokens], **how)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("per_step", [1, 2, 9])
def test_a_special_token_as_a_stop_string(per_step, skip):
    params = SamplingParams(stop=("<|end|>", "zz"), ignore_eos=True, skip_special_tokens=skip)
    stopper = Stopper(params, [END], WithSpecial([b"<|end|>", b"a", b"b"]), 100, read=True)
    ids, kept, shown = [1, END, 2, 0, 1, 2], 0, ""
    while stopper.reason is None:
        kept += stopper.accept(ids[kept : kept + per_step])
        shown += stopper.fresh()
    assert (kept, shown, stopper.reason, stopper.ended_by_token) == (4, "ab", "stop", True)


def test_special_tokens_may_stay_in_the_text():
    params = SamplingParams(skip_special_tokens=False, stop="d|>b")
    stopper = Stopper(params, [END], WithSpecial([b"<|end|>", b"a", b"b"]), 100, read=True)
    assert stopper.accept([1, 0, 1, 0, 2, 2]) == 5
    assert stopper.fresh() == "a<|end|>a<|en"


@pytest.mark.parametrize("per_step", [1, 2, 20])
def test_nothing_ends_a_text_before_its_minimum(per_step):
    """A stop string counts if it becomes complete behind that."""
    for minimum, expected in ((0, 2), (1, 2), (2, 4), (3, 4), (4, 6)):
        kept, shown, stopper = run([b"x", b"ST"] * 5, per_step, "ST", min_tokens=minimum)
        assert (kept, stopper.cut) == (expected, 3 * expected // 2 - 2)
        assert shown == ("xST" * 5)[: stopper.cut]
    _, shown, stopper = run([b"abS", b"TOP", b"c"], per_step, "STOP", min_tokens=1)
    assert (shown, stopper.reason) == ("ab", "stop")


def test_stop_tokens():
    for per_step in (1, 2, 5):
        kept, shown, stopper = run([b"a", b"b", b"c"], per_step, tail=[END], ignore_eos=True, stop_token_ids=[2])
        assert (kept, shown, stopper.reason, stopper.ended_by_token) == (3, "ab", "stop", True)


@given(
    st.lists(st.integers(0, 3) | st.just(END), max_size=12),
    st.sets(st.sampled_from(["<|end|>", "ab", "ba", "b", "|>a"]), max_size=3),
    st.integers(0, 6),
    st.booleans(),
    st.integers(1, 5),
)
def test_any_stops(ids: list[int], stops: set[str], minimum: int, skip: bool, per_step: int):
    """Against a look at all texts: it ends at the first token behind the minimum that ends it or a string."""
    tokenizer = WithSpecial([b"<|end|>", b"a", b"b", b"c"])
    settings = {"stop": tuple(sorted(stops)), "min_tokens": minimum, "skip_special_tokens": skip, "stop_token_ids": [3]}
    stopper = Stopper(SamplingParams(**settings), [END], tokenizer, 100, read=True)
    kept, shown = 0, ""
    while stopper.reason is None and kept < len(ids):
        kept += stopper.accept(ids[kept : kept + per_step])
        shown += stopper.fresh()

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=skip)

    for count, token in enumerate(ids, 1):
        if count <= minimum:
            continue
        before, now = text(count - 1), text(count)
        if token in (3, END) or (token == 0 and "<|end|>" in stops):
            assert (kept, shown, stopper.reason) == (count, before, "stop")
            return
        found = [at for stop in stops if (at := now.find(stop, max(0, len(before) - len(stop) + 1))) >= 0]
        if found:
            assert (kept, shown, stopper.reason) == (count, now[: min(found)], "stop")
            return
    assert stopper.reason is None and kept == len(ids)
