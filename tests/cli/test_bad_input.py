"""Bad input: one clear sentence on stderr, exit status 2, nothing on stdout, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.model.checkpoint import resolve

Run = Callable[..., object]


def assert_refused(ran, *words: str) -> None:
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err.startswith("hasten: ") and ran.err.count("\n") == 1, ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the shipped model to damage."""
    return Path(shutil.copytree(resolve("tiny"), tmp_path / "broken"))


def test_unknown_method_names_the_nearest(hasten):
    for command in (["generate", "hi"], ["race"], ["verify"]):
        assert_refused(hasten(*command, "--method", "ngrm"), "unknown method 'ngrm'", "ngram")


def test_unknown_method_parameter_lists_them(hasten):
    assert_refused(hasten("generate", "hi", "--method", "ngram:size=3"), "no parameter 'size'", "length")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ngram:length=0", "between 1 and 64"),
        ("ngram:length=many", "whole number"),
        ("ngram:minimum=5,maximum=2", "minimum <= maximum"),
        ("draft-model:width=99", "between 1 and 8"),
        ("draft-model:confidence=2", "between 0 and 1"),
    ],
)
def test_method_parameters_out_of_range(hasten, spec: str, words: str):
    assert_refused(hasten("generate", "hi", "--method", spec), words)


def test_backend_that_does_not_fit(hasten):
    assert_refused(hasten("generate", "hi", "--backend", "fast"), "auto, torch, native")
    assert_refused(hasten("generate", "hi", "--backend", "native", "--dtype", "float16"), "bfloat16 on CPU only")
    assert_refused(hasten("generate", "hi", "--weights", "int3"), "dense, int8, int4")
    assert_refused(hasten("generate", "hi", "--weights", "int8", "--backend", "torch"), "need the native backend")


def test_missing_checkpoint(hasten):
    assert_refused(hasten("generate", "hi", "--model", "./nowhere"), "no checkpoint at './nowhere'")


def test_folder_without_checkpoint(hasten, tmp_path: Path):
    assert_refused(hasten("generate", "hi", "--model", str(tmp_path)), "config.json")


def test_corrupt_weights(hasten, broken: Path):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(hasten("generate", "hi", "--model", str(broken)), "corrupt")


def test_corrupt_config(hasten, broken: Path):
    (broken / "config.json").write_text("{")
    assert_refused(hasten("generate", "hi", "--model", str(broken)), "config.json")


def test_missing_tokenizer(hasten, broken: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink(missing_ok=True)
    assert_refused(hasten("generate", "hi", "--model", str(broken)), "tokenizer")


def test_end_of_text_that_is_not_in_the_vocabulary(hasten, broken: Path):
    def name(**ends: object) -> None:
        for file in ("config.json", "generation_config.json"):
            raw = json.loads((broken / file).read_text()) if (broken / file).exists() else {}
            (broken / file).write_text(json.dumps(raw | ends))

    name(eos_token_id=99_999)
    ran = hasten("generate", "hi", "--model", str(broken), "--max-tokens", "1", "--json")
    assert (ran.status, ran.json()["finish_reason"]) == (0, "length")
    assert ran.err == f"hasten: {broken} names 99999 as end of text, which the vocabulary does not have\n"
    raw = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps({**raw, "eos_token": None}))
    assert_refused(hasten("generate", "hi", "--model", str(broken)), "no text would ever end")


def test_unsupported_architecture_lists_the_supported(hasten, broken: Path):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert_refused(hasten("generate", "hi", "--model", str(broken)), "'gpt2' is not supported", "llama", "qwen3")


def test_prompt_longer_than_the_context(hasten):
    assert_refused(hasten("generate", "word " * 3000), "leaves no room in the context of 1024")


def test_empty_prompt(hasten):
    assert_refused(hasten("generate", ""), "prompt is empty")


def test_drafter_that_is_not_there(hasten, broken: Path):
    ran = hasten("generate", "hi", "--model", str(broken), "--method", "draft-model")
    assert_refused(ran, "broken-draft", "model=")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--max-tokens", "0", "max_tokens"),
        ("--n", "0", "n must be"),
        ("--acceptance", "sometimes", "match, max or typical"),
        ("--dtype", "float8", "dtype must be"),
        ("--device", "warp", "'warp' is not available"),
        ("--threads", "-2", "threads"),
        ("--threads", "100000", "threads must be between 0 (all cores) and"),
        ("--top-k", "x", "top-k"),
    ],
)
def test_options_out_of_range(hasten, option: str, value: str, words: str):
    assert_refused(hasten("generate", "hi", option, value), words)


def test_unknown_command_and_option(hasten):
    assert_refused(hasten("rase"), "rase")
    assert_refused(hasten("race", "--fast"), "--fast")


def test_prompt_files(hasten, tmp_path: Path):
    assert_refused(hasten("verify", "--prompts", str(tmp_path / "none.jsonl")), "none.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"text": "no prompt"}\n')
    assert_refused(hasten("verify", "--prompts", str(bad)), "line 2", "'prompt'")
    bad.write_text("\n")
    assert_refused(hasten("bench", "--suite", str(bad)), "no prompts")
    assert_refused(hasten("bench", "--suite", "poetry"), "unknown suite 'poetry'", "tasks")


def test_training_arguments(hasten, tmp_path: Path):
    out = str(tmp_path / "model")
    assert_refused(hasten("train", "lm", "--output", out, "--heads", "7"), "multiple of heads")
    assert_refused(hasten("train", "lm", "--output", out, "--precision", "int3"), "bf16 or fp32")
    assert_refused(hasten("train", "scylla", "--output", out, "--tokens", "1000,2000"), "at least four different")
    assert_refused(hasten("train", "scylla", "--output", out, "--layers", "1,2,three,4"), "whole numbers")
    assert not (tmp_path / "model").exists()
