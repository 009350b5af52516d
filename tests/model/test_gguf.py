"""GGUF checkpoints: the same logits, ids and ends as the Hugging Face checkpoint that they were made from."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_level, rounded, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hasten import LLM
from hasten.cache import Cache
from hasten.errors import Notice, UserError
from hasten.model import Decoder, Rows, Span, load_model
from hasten.model.checkpoint import resolve, weight_bytes
from hasten.model.gguf import GGUFTensors, open_gguf, read_config, read_tokenizer
from hasten.model.gguf.file import QUANTISED
from hasten.model.gguf.tensors import SCALES
from hasten.model.tokenizer import load_tokenizer
from hasten.model.weights import Blocks
from helpers import CHAT_TEMPLATE, make_model, make_tokenizer, random_model

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
"""Rows of whole blocks."""
TOKENS = [1, 5, 9, 33, 96, 7, 7, 2, 50]
TEXTS = [
    "",
    " ",
    "   ",
    "the cat and the moon",
    "  two spaces  and\ttabs\n\n\nlines \r\n",
    "don't WE'LL 'S",
    "1234567 12 3.14",
    "é€😀 ünï — 日本語テキスト ไทย \u0301combining e\u0301",
    "<s>the</s>",
    "the <s>  the</s> the<s>",
    "<s></s>",
    "a<|tool|>b <|tool|> c",
    "\u2581the \u2581\u2581 moon",
    "x = [i**2 for i in range(10)]  # ok?!",
    "\x00\x01\x7f",
]


def logits(model: Decoder, tokens: list[int] = TOKENS) -> torch.Tensor:
    count = len(tokens)
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    return model.forward(Rows(torch.tensor(tokens), torch.arange(count), [Span(sequence, 0, count)]))


def quiet(path: Path, **options: Any) -> Decoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return load_model(path, **{"dtype": "float32", "backend": "torch", **options})


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_are_those_of_the_rounded_weights(architecture: str, kind: Kind, tmp_path: Path) -> None:
    tied = kind in (Kind.Q8_0, Kind.F16)
    model = rounded(random_model(architecture, **SHAPE, tie_word_embeddings=tied), kind)
    window = {"llama.attention.sliding_window": 4} if architecture == "mistral" else {}
    if window:
        model.config.sliding_window = 4
    model.save_pretrained(tmp_path / "folder")
    file = write_model(tmp_path / "model.gguf", model, kind, window)
    assert torch.equal(logits(quiet(file)), logits(quiet(tmp_path / "folder")))


@pytest.mark.parametrize("name", QUANTISED)
def test_every_type_is_expanded_as_the_package_does(name: str, tmp_path: Path) -> None:
    model = random_model("llama", vocab_size=40, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    kind, raw = Kind[name], np.random.default_rng(0)
    file = write_model(tmp_path / "model.gguf", model, tensors={"extra.weight": np.zeros((3, 256), np.float32)})
    opened = open_gguf(file)
    tensors = GGUFTensors(opened, read_config(opened), torch.float32, torch.device("cpu"))
    per_block, size = GGML_QUANT_SIZES[kind]
    blocks = raw.integers(0, 256, (5 * 256 // per_block, size), np.uint8)
    first, last = SCALES[name]
    blocks.view("<f2")[:, first:last] = raw.normal(size=(len(blocks), last - first))
    rows = blocks.reshape(5, -1)
    expanded = tensors._expand(Blocks(name, torch.from_numpy(rows), 256))
    assert torch.equal(expanded, torch.from_numpy(dequantize(rows, kind)))
    assert expanded.isfinite().all()


def test_the_backends_agree_and_types_that_were_expanded_are_named_once(tmp_path: Path) -> None:
    model = rounded(random_model("llama", **SHAPE), Kind.Q4_1)
    file = write_model(tmp_path / "model.gguf", model, Kind.Q4_1)
    with pytest.warns(Notice, match=r"^model.gguf: its table of tokens, Q4_1, is expanded to float32$") as told:
        native = load_model(file, "float32", backend="native")
    with pytest.warns(Notice, match=r"^model.gguf: weights of Q4_1 are expanded to float32$") as told_too:
        expanded = load_model(file, "float32", backend="torch")
    assert len(told) == len(told_too) == 1
    # The native step keeps the blocks, and rounds what they are multiplied with to codes of 8 bits.
    one, other = logits(native), logits(expanded)
    assert 0 < (one - other).abs().max() < 0.05 * other.abs().max()
    plain = write_model(tmp_path / "plain.gguf", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(plain, "float32")


def test_pieces_stay_as_they_are_stored(tmp_path: Path) -> None:
    file = open_gguf(write_model(tmp_path / "model.gguf", random_model("llama", **SHAPE), Kind.Q8_0))
    tensors = GGUFTensors(file, read_config(file), torch.float32, torch.device("cpu"))
    name = "model.layers.0.self_attn.{}_proj.weight"
    piece = tensors.piece([name.format("q"), name.format("k")], [(64, 64), (32, 64)])
    assert [(each.type, each.inputs, tuple(each.rows.shape)) for each in piece.stored] == [
        ("Q8_0", 64, (64, 68)), ("Q8_0", 64, (32, 68)),
    ]  # fmt: skip
    assert torch.equal(piece.weight, tensors.stacked([name.format("q"), name.format("k")]))
    mapped = tensors.piece(["model.layers.0.mlp.down_proj.weight"], [(64, 96)]).stored[0].rows
    assert mapped.data_ptr() == file.rows("blk.0.ffn_down.weight").ctypes.data


def test_dtype_is_bf16_unless_the_file_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_model(tmp_path / "model.gguf", random_model("llama", **SHAPE), Kind.F16)
    assert quiet(file, dtype="auto").dtype == torch.float32
    monkeypatch.setattr("hasten.model.loading.SMALL_MODEL_BYTES", 100)
    assert quiet(file, dtype="auto").dtype == torch.bfloat16
    assert weight_bytes(file) == file.stat().st_size


ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": ({"rope_type": "default", "rope_theta": 1e6}, {}),
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "older linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, {"rope.scale_linear": 2.0}),
    "yarn": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_ropes_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    rope, keys = ROPES[name]
    model = random_model("llama", **SHAPE, rope_parameters=rope)
    model.save_pretrained(tmp_path / "folder")
    file = write_model(tmp_path / "model.gguf", model, metadata={f"llama.{key}": value for key, value in keys.items()})
    ours, theirs = quiet(file).config, quiet(tmp_path / "folder").config
    assert (ours.inverse_frequencies, ours.rope_factor) == (theirs.inverse_frequencies, theirs.rope_factor)


def test_factors_of_llama_3_scale_the_frequencies(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = random_model("llama", **SHAPE, rope_parameters=rope)
    model.save_pretrained(tmp_path / "folder")
    theirs = quiet(tmp_path / "folder").config.inverse_frequencies
    plain = 1 / 5e5 ** (np.arange(0, 16, 2) / 16)
    file = write_model(
        tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": (plain / np.array(theirs)).astype(np.float32)}
    )
    np.testing.assert_allclose(read_config(open_gguf(file)).inverse_frequencies, theirs, rtol=1e-6)


def test_other_architectures_and_what_is_not_supported_are_refused_by_name(tmp_path: Path) -> None:
    model = random_model("llama", **SHAPE)

    def refused(match: str, **keys: Any) -> None:
        named = {key.replace("__", "."): value for key, value in keys.items()}
        file = write_model(tmp_path / "model.gguf", model, metadata=named)
        with pytest.raises(UserError, match=match):
            load_model(file)

    refused("architecture 'gemma3' in .* not supported; supported in GGUF are llama, qwen2, qwen3$",
            general__architecture="gemma3")  # fmt: skip
    refused("rope type 'longrope' is not supported", llama__rope__scaling__type="longrope")
    refused("rope.dimension_count 8 beside heads of 16", llama__rope__dimension_count=8)
    refused("one of 3 parts", split__count=3)
    refused("has another llama.attention.head_count_kv in each layer", llama__attention__head_count_kv=[2, 1])


@pytest.mark.parametrize("kind", [Kind.F64, Kind.I32])
def test_other_types_are_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    values = np.zeros(64, np.float64 if kind == Kind.F64 else np.int32)
    file = write_model(tmp_path / "model.gguf", random_model("llama", **SHAPE), tensors={"odd": values})
    with pytest.raises(UserError, match=f"odd in .* is {kind.name}, which is not supported; supported are F32, F16"):
        load_model(file)


def test_nan_and_infinity_are_found(tmp_path: Path) -> None:
    for kind in (Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1):
        model = random_model("llama", **SHAPE)
        file = write_model(tmp_path / "model.gguf", model, kind)
        opened = open_gguf(file)
        place = opened.tensors["blk.1.ffn_down.weight"].offset
        data = bytearray(file.read_bytes())
        data[place : place + 4] = (
            np.array([np.nan], np.float32 if kind == Kind.F32 else np.float16).tobytes().ljust(4, b"\0")
        )
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"blk.1.ffn_down.weight in .* holds NaN or infinity"):
            quiet(file)


WORDS = "the cat and the moon sing in the garden when another morning reads the stars, 12 345 WE'LL don't <|tool|>"


def trained(pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a pre-tokenizer, special tokens and one that is not."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(
        [WORDS, "é€😀 日本語"] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As the tokenizer.json of Llama 3 has it."""
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
BYTE_LEVEL: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: trained(BYTES),
    "smollm": lambda: trained(DIGITS),
    "llama-bpe": lambda: trained(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: trained(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_ids_are_those_of_the_tokenizer_it_was_made_from(pre: str, tmp_path: Path) -> None:
    theirs = BYTE_LEVEL[pre]()
    model = random_model("llama", **SHAPE, vocab_size=len(theirs))
    keys = byte_level(theirs, pre, **{"ggml.add_bos_token": False})
    ours = load_tokenizer(write_model(tmp_path / "model.gguf", model, tokenizer=keys))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "the cat"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 1)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text)["input_ids"] for text in TEXTS] == [ours(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("pre", "keys", "around"),
    [
        ("gpt-2", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"ggml.add_bos_token": False}, (False, False)),
        ("gpt-2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, (True, True)),
    ],
)
def test_texts_begin_and_end_as_the_file_says(
    pre: str, keys: dict[str, bool], around: tuple[bool, bool], tmp_path: Path
) -> None:
    theirs = trained(BYTES)
    model = random_model("llama", **SHAPE, vocab_size=len(theirs))
    ours = load_tokenizer(write_model(tmp_path / "m.gguf", model, tokenizer=byte_level(theirs, pre, **keys)))
    bare = ours("the moon", add_special_tokens=False)["input_ids"]
    first, last = around
    assert ours("the moon")["input_ids"] == [*[0] * first, *bare, *[1] * last]


PIECES = [
    *("▁the", "▁cat", "the", "▁m", "oon", "▁moon", "an", "and", "▁and", "▁▁"),
    *("▁▁▁", "in", "ing", "▁s", "oo", "th", "ca", "at", "cat"),
]


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types, as SentencePiece's BPE would make them."""
    letters = sorted(set("▁thecatmoonandingsredw'.,12345é<>/|l"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *letters, "<|tool|>"]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) + len(letters))] + [0.0]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(PIECES) + len(letters)), USER_DEFINED]
    return tokens, scores, types


def of_transformers(tokens: list[str], scores: list[float], add_space: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of Llama 2's tokenizer.json."""
    from transformers.tokenization_utils_base import generate_merges

    pieces = dict(zip(tokens[259:-1], scores[259:-1], strict=True))
    merges = generate_merges({token: id for id, token in enumerate(tokens) if token in pieces}, pieces)
    made = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    space = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if add_space else space
    stripped = [decoders.Strip(" ", 1, 0)] if add_space else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("<|tool|>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_ids_are_those_of_the_tokenizer_it_was_made_from(add_space: bool, tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece()
    theirs = of_transformers(tokens, scores, add_space)
    keys: dict[str, Any] = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    keys |= {"add_space_prefix": add_space, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    model = random_model("llama", **SHAPE, vocab_size=len(tokens))
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    ours = load_tokenizer(write_model(tmp_path / "model.gguf", model, tokenizer=named))
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == [1, *ids], text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert ours.tokenize("the cat and 日") == (
        ["▁the", "▁cat", "▁and", "▁", "<0xE6>", "<0x97>", "<0xA5>"] if add_space
        else ["the", "▁cat", "▁and", "▁", "<0xE6>", "<0x97>", "<0xA5>"]
    )  # fmt: skip


def test_unknown_tokenizers_and_pre_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    theirs = trained(BYTES)
    model = random_model("llama", **SHAPE, vocab_size=len(theirs))
    for changes, match in (
        ({"tokenizer.ggml.pre": "klingon"}, "pre-tokenizer 'klingon' in .* is not supported; supported are .*smollm"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' in .* is not supported; supported are gpt2, llama"),
        ({"tokenizer.ggml.merges": ["zz q"]}, "has no usable tokenizer: .*zz"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "has tokenizer.ggml.eos_token_id 9999, but 333 tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "has the token 'a' twice"),
        ({"tokenizer.ggml.tokens": ["x" * 2000]}, "has a token of 2000 characters"),
        ({"tokenizer.ggml.model": "llama"}, "has no tokenizer.ggml.scores"),
    ):
        file = write_model(tmp_path / "model.gguf", model, tokenizer=byte_level(theirs, "gpt-2") | changes)
        with pytest.raises(UserError, match=match):
            load_tokenizer(file)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The model of random weights that `tiny` is, as a file."""
    keys = byte_level(make_tokenizer(), "gpt-2", **{"ggml.eot_token_id": 5, "ggml.eom_token_id": 6})
    return write_model(tmp_path / "tiny.gguf", make_model(), tokenizer=keys)


def test_a_file_decodes_as_its_folder_does(tiny_file: Path, tiny: Path) -> None:
    file, folder = LLM(tiny_file), LLM(tiny, dtype="float32")
    assert file.engine.end_ids == {1, 5, 6}
    prompt = "the moon "
    # End ids differ: the file has two more.
    theirs, ours = folder.generate([prompt])[0].token_ids, file.generate([prompt])[0].token_ids
    assert ours == theirs[: len(ours)]
    messages = [{"role": "user", "content": "the cat"}]
    assert file.apply_chat_template(messages) == folder.apply_chat_template(messages)


def test_what_decoding_asks_of_a_tokenizer_is_what_transformers_says(tiny_file: Path) -> None:
    """A file whose ends are no control tokens has them made special, as transformers would."""
    keys = byte_level(make_tokenizer(), "gpt-2")
    keys["tokenizer.ggml.token_type"] = [1] * len(keys["tokenizer.ggml.tokens"])
    bare = write_model(tiny_file.with_name("bare.gguf"), make_model(), tokenizer=keys)
    for file in (tiny_file, bare):
        light = read_tokenizer(open_gguf(file))
        ids = light.encode("the moon <|end|> é <s></s>")
        assert ids == light.complete.encode("the moon <|end|> é <s></s>")
        for skip in (False, True):
            assert light.decode([*ids, 0, 1, 2], skip) == light.complete.decode([*ids, 0, 1, 2], skip)
        assert light.get_vocab() == light.complete.get_vocab() and len(light) == len(light.complete)
        assert light.all_special_ids == sorted(light.complete.all_special_ids)
        assert light.eos_token == light.complete.eos_token and light.bos_token_id == light.complete.bos_token_id
        assert light.get_added_vocab() == light.complete.get_added_vocab()
        assert light.chat_template == light.complete.chat_template


def test_generating_from_a_file_does_not_wait_for_transformers(tiny_file: Path) -> None:
    code = """
import sys
from hasten import LLM, SamplingParams
llm = LLM(sys.argv[1])
llm.generate(["the moon"], SamplingParams(max_tokens=2))
llm.apply_chat_template([{"role": "user", "content": "the cat"}])
print("transformers" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tiny_file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "False"


def test_drafters_and_auto_find_the_small_model_beside_a_file(tiny_file: Path, tmp_path: Path) -> None:
    from hasten.methods.drafters.small_model import beside

    llm = LLM(tiny_file)
    assert beside(llm.engine.target) == str(tmp_path / "tiny-draft")
    with pytest.raises(UserError, match="finds no drafter at"):
        llm.generate(["the"], method="draft-model")
    write_model(tmp_path / "tiny-draft.gguf", make_model(0.05), tokenizer=byte_level(make_tokenizer(), "gpt-2"))
    assert beside(llm.engine.target) == str(tmp_path / "tiny-draft.gguf")
    plain = llm.generate(["the moon "])[0]
    for method in ("draft-model", "auto", f"draft-model:model={tmp_path / 'tiny-draft.gguf'}"):
        drafted = llm.generate(["the moon "], method=method)[0]
        assert drafted.token_ids == plain.token_ids
    assert drafted.choices[0].steps < len(plain.token_ids)


def test_files_are_known_by_name_and_by_how_they_begin(tiny_file: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-12ab"
    blob.write_bytes(tiny_file.read_bytes())
    assert resolve(blob) == blob and resolve(tiny_file) == tiny_file
    assert read_tokenizer(open_gguf(blob)).eos_token_id == 1
    other = tmp_path / "other.bin"
    other.write_bytes(b"nothing")
    for path in (other, tmp_path / "missing.gguf", "some/missing.gguf"):
        with pytest.raises(UserError, match=r"no folder, no GGUF file, no hub id"):
            resolve(path)


def test_training_takes_the_tokenizer_of_a_file_and_adaptation_refuses_one(tiny_file: Path) -> None:
    from hasten.train.diffusion.layout import load
    from hasten.train.tokenizer import load_tokenizer as for_training

    assert for_training(tiny_file).get_vocab() == make_tokenizer().get_vocab()
    with pytest.raises(UserError, match="is a GGUF file: only the models of folders can be adapted"):
        load(tiny_file)
