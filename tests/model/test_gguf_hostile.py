"""Corrupt, cut off and hostile GGUF files: one sentence each, soon, or the file loads and decodes."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf_files import byte_level, write_model

from hasten import LLM, SamplingParams
from hasten.errors import UserError
from helpers import make_model, make_tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
NUMBERS = (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
SECONDS, BYTES = 10.0, 64 * 2**20
"""What a file of some 200 KB may take at most."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = byte_level(make_tokenizer(), "gpt-2", **{"ggml.add_bos_token": True})
    return write_model(folder / "sound.gguf", make_model(**SHAPE), Kind.Q8_0, tokenizer=tokenizer)


def numbers(file: Path) -> Iterator[tuple[int, int]]:
    """Place and size of each number that says how the header goes on: counts, lengths, types, dimensions, offsets."""
    yield from ((4, 4), (8, 8), (16, 8))
    reader = GGUFReader(file)
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        place = field.offset
        for part in field.parts[:6]:
            if part.nbytes in (4, 8) and part.dtype != np.uint8:
                yield place, part.nbytes
            place += part.nbytes
    for tensor in reader.tensors[::4]:
        place = tensor.field.offset
        for part in tensor.field.parts:
            if part.dtype != np.uint8:
                yield from (
                    ((place + 8 * number, 8) for number in range(part.size)) if part.itemsize == 8 else [(place, 4)]
                )
            place += part.nbytes


def changed(file: Path) -> Iterator[tuple[str, bytes]]:
    """What is wrong, and the file."""
    data = file.read_bytes()
    for place in sorted(
        {0, 1, 3, 4, 7, 8, 23, 24, 31, *range(32, 6000, 250), *range(6000, len(data), 12_000), len(data) - 1}
    ):
        yield f"cut off at {place}", data[:place]
    for index, (place, size) in enumerate(numbers(file)):
        for turn in range(2):
            number = NUMBERS[(3 * index + 5 * turn) % len(NUMBERS)] % 2 ** (8 * size)
            yield (
                f"{number} at {place}",
                data[:place] + struct.pack("<I" if size == 4 else "<Q", number) + data[place + size :],
            )
    random = np.random.default_rng(0)
    for place in random.integers(0, 7000, 60).tolist():
        yield f"a bit at {place}", data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        yield f"255 at {place}", data[:place] + b"\xff" * 4 + data[place + 4 :]


def outcome(file: Path) -> str | None:
    """The sentence that refuses a file; None where it decodes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LLM(file, dtype="float32").generate(["the moon"], SamplingParams(max_tokens=2))
    except UserError as error:
        return str(error)
    return None


def test_whatever_is_wrong_is_one_sentence_or_harmless(sound: Path, tmp_path: Path) -> None:
    assert outcome(sound) is None
    file, refused, tried = tmp_path / "changed.gguf", 0, 0
    tracemalloc.start()
    try:
        for what, data in changed(sound):
            file.unlink(missing_ok=True)
            file.write_bytes(data)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()
            sentence = outcome(file)
            assert time.process_time() - start < SECONDS, what
            assert tracemalloc.get_traced_memory()[1] - before < BYTES, what
            assert sentence is None or (0 < len(sentence) < 1000 and "\n" not in sentence), (what, sentence)
            tried, refused = tried + 1, refused + (sentence is not None)
    finally:
        tracemalloc.stop()
    assert tried > 250 and refused > 150


KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_values_that_make_no_sense_are_refused(key: str, tmp_path: Path) -> None:
    model, tokenizer = make_model(**SHAPE), byte_level(make_tokenizer(), "gpt-2")
    values: list[Any] = ["text", True, [1.5, 2.5], ["a"], 2**31, 2**32 - 1, float("nan"), 1e30, -1.0]
    for value in values:
        file = write_model(tmp_path / "m.gguf", model, metadata={f"llama.{key}": value}, tokenizer=tokenizer)
        start, sentence = time.process_time(), outcome(file)
        assert time.process_time() - start < SECONDS
        sound = key in ("context_length",) and isinstance(value, int) and not isinstance(value, bool)
        sound |= key in ("rope.freq_base", "attention.layer_norm_rms_epsilon") and value in (2**31, 2**32 - 1, 1e30)
        assert (sentence is None) if sound else (sentence is not None and str(file) in sentence), (value, sentence)


@pytest.mark.parametrize("key", [*KEYS[:5], KEYS[6]])
def test_keys_that_are_missing_are_named(key: str, tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", make_model(**SHAPE), metadata={f"llama.{key}": None})
    assert outcome(file) == f"{file} has no llama.{key} among its metadata"


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            {"llama.embedding_length": 32},
            r"token_embd.weight in .* is \[150, 64\], but its metadata asks for \[150, 32\]",
        ),
        ({"llama.feed_forward_length": 64}, "but its metadata asks for"),
        ({"llama.attention.head_count": 8}, "but its metadata asks for|no whole number of heads"),
        ({"llama.attention.head_count_kv": 3}, "cannot share evenly"),
        ({"llama.block_count": 3}, "has no tensor blk.2.attn_norm.weight"),
        ({"llama.vocab_size": 151}, "but its metadata asks for"),
        ({"general.alignment": 33}, "general.alignment is 33"),
        ({"general.alignment": 8192}, "not aligned to 8192"),
        ({"tokenizer.ggml.tokens": [f"t{number}" for number in range(151)]}, "a vocabulary of 151 tokens"),
        ({"tokenizer.ggml.token_type": "text"}, "must be a list of finite numbers"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "must be a whole number"),
        ({"tokenizer.chat_template": 5}, "must be text"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens among its metadata"),
        ({"tokenizer.ggml.model": None}, "has no tokenizer.ggml.model among its metadata"),
    ],
)
def test_what_does_not_fit_is_named(keys: dict[str, Any], match: str, tmp_path: Path) -> None:
    tokenizer = byte_level(make_tokenizer(), "gpt-2") | keys
    file = write_model(tmp_path / "m.gguf", make_model(**SHAPE), tokenizer=tokenizer)
    with pytest.raises(UserError, match=match):
        LLM(file)


def test_names_and_keys_twice_and_text_that_is_none(sound: Path, tmp_path: Path) -> None:
    data, file = sound.read_bytes(), tmp_path / "m.gguf"
    for old, new, match in (
        (b"blk.0.attn_k.weight", b"blk.0.attn_q.weight", "it has the tensor blk.0.attn_q.weight twice"),
        (b"llama.block_count", b"llama.vocab_size2"[:17], "has no llama.block_count"),
        (
            b"tokenizer.ggml.bos_token_id",
            b"tokenizer.ggml.eos_token_id",
            "it has the key tokenizer.ggml.eos_token_id twice",
        ),
        (b"tokenizer.ggml.pre", b"\xff\xfekenizer.ggml.pre", "a key is no UTF-8 text"),
        (b"</s>", b"\xff\xff\xff\xff", "tokenizer.ggml.tokens is no UTF-8 text"),
    ):
        assert len(old) == len(new) and old in data
        file.unlink(missing_ok=True)
        file.write_bytes(data.replace(old, new, 1))
        with pytest.raises(UserError, match=match):
            LLM(file)


def test_the_command_line_says_one_sentence_and_exits_with_2(sound: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(sound.read_bytes()[:5000])
    command = [sys.executable, "-m", "hasten", "generate", "the moon", "--model", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "is damaged or cut off" in done.stderr
