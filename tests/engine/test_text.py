"""Text as it arrives: never half a character, and in the end the same as decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hasten.engine.text import Detokenizer, decode
from helpers import END, START, VOCABULARY, make_tokenizer

TOKENIZER = make_tokenizer()


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids: list[int], **options: bool) -> str:
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


@pytest.mark.parametrize("ids", [[0xFF], [0xE2, 0x82], [0xF0, 0x9F, 0x98, 0x41], [0x80, 0xC3]])
def test_a_long_run_of_broken_bytes_is_read_in_a_time_that_grows_with_it(ids):
    class Counted(Bytes):
        read = 0

        def decode(self, ids: list[int], **options: bool) -> str:
            self.read += len(ids)
            return super().decode(ids)

    counted = Counted()
    pieces, detokenizer = stream(counted, ids * 500)
    assert counted.read < 50 * len(ids * 500)
    assert "".join(pieces) + detokenizer.flush() == bytes(ids * 500).decode(errors="replace")


def test_special_tokens_that_are_not_shown_are_not_read():
    _, detokenizer = stream(TOKENIZER, [END] * 100)
    assert detokenizer._ids == []


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


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece's models are converted: words with a mark for the space, and a token for each byte."""
    words = ["<unk>", "</s>", "▁", "▁the", "▁cat", "s", "é", "�"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True)


FALLBACK = fallback_tokenizer()
BYTE = FALLBACK.convert_tokens_to_ids("<0x00>")
THE, CATS = FALLBACK.convert_tokens_to_ids("▁the"), FALLBACK.convert_tokens_to_ids(["▁cat", "s"])


def fallback(text: bytes) -> list[int]:
    return [BYTE + byte for byte in text]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (fallback(b"\xff" * 20 + "€".encode()), "�" * 20 + "€"),
        (fallback("é€😀".encode()), "é€😀"),
        (fallback("€€".encode()[:-1]), "€�"),
        ([*fallback("€€".encode()[:-1]), THE], "€� the"),
        ([THE, *fallback(b"\xff\xff\xe2\x82"), *CATS], "the��� cats"),
        ([THE, *fallback(b"\xe2"), FALLBACK.eos_token_id, *fallback(b"\x82\xac")], "the€"),
        ([*fallback(b"\xe2"), *[FALLBACK.eos_token_id] * 9, *fallback(b"\x82\xac")], "€"),
        ([THE, *fallback(b" ."), *CATS], "the . cats"),
    ],
)
def test_a_run_of_byte_tokens_that_is_cut_keeps_its_characters(ids, text):
    pieces, detokenizer = stream(FALLBACK, ids)
    assert "".join(pieces) + detokenizer.flush() == decode(FALLBACK, ids) == text


@given(
    st.lists(
        st.one_of(
            st.integers(0, len(FALLBACK) - 1),
            st.sampled_from(fallback("é€😀�".encode())),
        ),
        max_size=24,
    )
)
def test_any_ids_of_a_tokenizer_with_byte_tokens_add_up(ids):
    pieces, detokenizer = stream(FALLBACK, ids)
    assert "".join(pieces) + detokenizer.flush() == detokenizer.text == decode(FALLBACK, ids)
    whole = [*fallback("€".encode()), *ids]
    assert decode(FALLBACK, whole).startswith("€")


def test_names_of_bytes_are_text_where_nothing_falls_back_to_bytes():
    named = Tokenizer(models.WordLevel({f"<0x{byte:02X}>": byte for byte in range(256)}, unk_token="<0x00>"))
    named.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=named)
    assert decode(tokenizer, [0xE2, 0x41]) == "<0xE2><0x41>"
