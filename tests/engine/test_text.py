"""Text as it arrives: never half a character, and in the end the same as decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.text import Detokenizer, decode
from helpers import END, START, VOCABULARY, make_tokenizer

TOKENIZER = make_tokenizer()


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


def stream(tokenizer, ids: list[int]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids], detokenizer


def test_characters_come_whole():
    text = "aé€😀b"
    pieces, detokenizer = stream(Bytes(), list(text.encode()))
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.text == text
    assert detokenizer.flush() == ""


def test_incomplete_at_the_end():
    pieces, detokenizer = stream(Bytes(), list("ab😀".encode())[:-1])
    assert "".join(pieces) == detokenizer.text == "ab"
    assert set(detokenizer.flush()) == {"�"}
    assert detokenizer.text == "ab" + detokenizer.text[2:]
    assert detokenizer.flush() == ""


def test_broken_bytes_do_not_stop_the_stream():
    pieces, detokenizer = stream(Bytes(), [0x61, 0xE2, 0x62, 0xFF, 0x63])
    assert "".join(pieces) == detokenizer.text == "a�b�c"


@given(st.lists(st.sampled_from([*b"ab \n", *"é€😀�".encode(), 0xFF, 0xC3, 0x80]), max_size=24))
def test_any_bytes_add_up(ids):
    pieces, detokenizer = stream(Bytes(), ids)
    rest = detokenizer.flush()
    assert "".join(pieces) + rest == detokenizer.text == bytes(ids).decode(errors="replace")


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
def test_any_ids_of_a_real_tokenizer_add_up(ids):
    pieces, detokenizer = stream(TOKENIZER, ids)
    rest = detokenizer.flush()
    assert "".join(pieces) + rest == detokenizer.text == decode(TOKENIZER, ids)


@pytest.mark.parametrize("text", ["the cat and the moon", " leading and trailing ", "a\n\nb  c", "50 € for 😀, é!"])
def test_text_survives_a_real_tokenizer(text):
    ids = TOKENIZER(text)["input_ids"]
    pieces, detokenizer = stream(TOKENIZER, ids)
    assert "".join(pieces) == detokenizer.text == text
    assert "�" not in "".join(pieces)


def test_special_tokens_are_not_text():
    ids = TOKENIZER("the cat")["input_ids"]
    _, detokenizer = stream(TOKENIZER, [START, *ids, END, *ids, END])
    assert detokenizer.text == "the catthe cat" == decode(TOKENIZER, [START, *ids, END, *ids, END])
