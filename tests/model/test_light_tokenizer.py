"""The light tokenizer does what transformers' does with the same files, or is not used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hasten.model.checkpoint import resolve, shipped
from hasten.model.light_tokenizer import NAMES, LightTokenizer
from hasten.model.tokenizer import load_tokenizer, render_chat
from helpers import make_tokenizer

TEXTS = [
    "",
    " ",
    "Reverse the list: red cat moon\nAnswer:",
    "  two  spaces,tabs\t\tand\r\nlines\n\n",
    "caf\u00e9 \u20ac \U0001f600 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 a\u0300 \ufffd \x00 12345 don't , .",
    "<s>text</s> that spells<|end|>tokens <|pad|>",
    "def f(x):\n    return x ** 2  # two",
]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces with a prefix space, bytes for what is unknown, and a beginning of text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "t",
        "c",
        "\u2581c",
        "at",
    ]
    merges = [("\u2581", "c"), ("a", "t")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"two": 0, "cat": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken("<tool>", lstrip=True, single_word=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


MADE = {"bytes": make_tokenizer, "sentencepiece": sentencepiece, "words": words}


@pytest.fixture(params=[*shipped(), *MADE])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint's, as far as its tokenizer goes."""
    if request.param not in MADE:
        return resolve(request.param)
    MADE[request.param]().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_it_is_the_same_tokenizer(folder: Path):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, LightTokenizer)
    for text in TEXTS:
        for special in (True, False):
            ids = ours(text, add_special_tokens=special)["input_ids"]
            assert ids == ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.decode(ids) == theirs.decode(ids)
    draw = random.Random(0)
    for length in range(40):
        ids = [draw.randrange(len(theirs)) for _ in range(length)]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.all_special_ids == sorted(theirs.all_special_ids)
    assert {number: repr(token) for number, token in ours.added_tokens_decoder.items()} == {
        number: repr(token) for number, token in theirs.added_tokens_decoder.items()
    }
    for name in NAMES:
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    assert ours.chat_template == theirs.chat_template
    assert "complete" not in vars(ours)
    if theirs.chat_template is not None:
        messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}] * 2
        assert render_chat(ours, messages[:3]) == render_chat(theirs, messages[:3])


def test_what_else_is_asked_for_comes_from_transformers():
    ours, theirs = load_tokenizer("tiny"), AutoTokenizer.from_pretrained(resolve("tiny"))
    assert ours(["red", "cat"])["input_ids"] == theirs(["red", "cat"])["input_ids"]
    assert ours.decode([[5], [6]]) == theirs.decode([[5], [6]])
    assert ours.tokenize("red cat") == theirs.tokenize("red cat")
    assert ours.encode("red", return_tensors="pt").shape[0] == 1


def test_a_chat_template_that_was_replaced():
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{{ messages[0].content }}!"
    assert render_chat(tokenizer, [{"role": "user", "content": "Hi"}]) == "Hi!"


def unknown_key(folder: Path) -> None:
    edit(folder, add_prefix_space=True)


def other_class(folder: Path) -> None:
    edit(folder, tokenizer_class="LlamaTokenizerFast")


def cleaned_up(folder: Path) -> None:
    edit(folder, clean_up_tokenization_spaces=True)


def token_of_its_own(folder: Path) -> None:
    edit(folder, sep_token="<new>")


def token_with_settings(folder: Path) -> None:
    edit(folder, eos_token={"__type": "AddedToken", "content": "</s>", "lstrip": True})


def named_elsewhere(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"pad_token": "</s>"}')


def shortened(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "change",
    [unknown_key, other_class, cleaned_up, token_of_its_own, token_with_settings, named_elsewhere, shortened],
)
def test_where_more_is_to_be_read_transformers_reads_it(change, tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    change(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours("the cat</s> ")["input_ids"] == theirs("the cat</s> ")["input_ids"]
