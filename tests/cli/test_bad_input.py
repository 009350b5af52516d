"""Bad input: one clear sentence on stderr, exit status 2, nothing on stdout, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

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
    bad.write_text("[" * 100_000)
    assert_refused(hasten("verify", "--prompts", str(bad)), "line 1", "not JSON")
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden", "0"], "hidden, heads and kv-heads must be positive"),
        (["--hidden", "-64"], "must be positive"),
        (["--heads", "0"], "must be positive"),
        (["--heads", "-1"], "must be positive"),
        (["--kv-heads", "0"], "must be positive"),
        (["--hidden", "8", "--heads", "8"], "even multiple"),
        (["--context", "0"], "context must be at least"),
        (["--context", "-5"], "context must be at least"),
        (["--opening", "2"], "shares of the run"),
        (["--curriculum", "-1"], "shares of the run"),
        (["--lr", "-1"], "lr must be positive"),
        (["--tokens", "0"], "must be positive"),
        (["--layers", "0"], "must be positive"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_shapes_that_no_model_has(hasten, tmp_path: Path, options: list[str], words: str):
    assert_refused(hasten("train", "lm", "--output", str(tmp_path / "model"), *options), words)
    assert not (tmp_path / "model").exists()


def damage(folder: Path, how: str) -> tuple[str, ...]:
    """Make a model's output meaningless; the words that it is refused with."""
    kind, _, value = how.partition(" ")
    if kind == "rms_norm_eps":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {kind: json.loads(value)}))
        return (f"rms_norm_eps {json.loads(value)}", "finite number")
    if kind == "temperature":
        (folder / "generation_config.json").write_text(f'{{"do_sample": true, "temperature": {value}}}')
        return ("temperature must be",)
    tensors = load_file(folder / "model.safetensors")
    if kind == "weights":
        largest = max(float(tensor.abs().max()) for tensor in tensors.values())
        scaled = {name: tensor.float() * (float(value) / largest) for name, tensor in tensors.items()}
        save_file(scaled, folder / "model.safetensors")
        return ("the model's logits are not finite",)
    name = next(name for name in tensors if value in name)
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return (name, str(folder), "NaN")


@pytest.mark.parametrize(
    "how",
    [
        "nan embed_tokens",
        "nan down_proj",
        "nan model.norm",
        "weights 1e38",
        "weights 1e15",
        "rms_norm_eps NaN",
        "rms_norm_eps Infinity",
        "rms_norm_eps -1",
    ],
)
@pytest.mark.parametrize(
    "run",
    [
        ["--backend", "torch", "--dtype", "float32"],
        ["--backend", "native", "--dtype", "float32"],
        ["--dtype", "bfloat16"],
        ["--weights", "int8"],
        ["--weights", "int4"],
    ],
    ids=lambda run: " ".join(run),
)
def test_models_without_finite_logits(hasten, broken: Path, how: str, run: list[str]):
    words = damage(broken, how)
    if "--weights" in run and how.startswith("weights"):
        words = ("too large to be rounded",)
    model = ["--model", str(broken), *run]
    for options in ([], ["--json"], ["--method", "ngram"], ["--temperature", "1", "--seed", "1", "--json"]):
        ran = hasten("generate", "the cat", "--max-tokens", "4", *model, *options)
        assert_refused(ran, *words)


@pytest.mark.parametrize("how", ["nan q_proj", "weights 1e38", "rms_norm_eps NaN", "rms_norm_eps -1"])
def test_broken_outputs_are_never_called_identical(hasten, broken: Path, how: str):
    words = damage(broken, how)
    for options in ([], ["--json"]):
        assert_refused(hasten("verify", "--model", str(broken), "--method", "ngram", *options), *words)


def test_drafters_that_are_no_models(hasten, broken: Path):
    drafter = Path(shutil.copytree(resolve("tiny-draft"), broken.parent / "drafter"))
    words = damage(drafter, "nan o_proj")
    run = ["generate", "hi", "--max-tokens", "4", "--method", f"draft-model:model={drafter}"]
    assert_refused(hasten(*run), *words)
    shutil.rmtree(drafter)
    shutil.copytree(resolve("tiny-draft"), drafter)
    words = damage(drafter, "weights 1e38")
    # As text comes, its first token is there before the drafter is asked.
    assert_refused(hasten(*run, "--json"), *words)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1"])
def test_sampling_that_a_checkpoint_asks_for(hasten, broken: Path, value: str):
    words = damage(broken, f"temperature {value}")
    assert_refused(hasten("generate", "hi", "--model", str(broken)), *words)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_options_that_are_no_numbers(hasten, tmp_path: Path, value: str):
    sampling = (
        "temperature",
        "top-p",
        "min-p",
        "repetition-penalty",
        "presence-penalty",
        "frequency-penalty",
    )
    for option in sampling:
        assert_refused(hasten("generate", "hi", f"--{option}", value), option.replace("-", "_"))
    assert_refused(hasten("race", "--slow", value), "slow")
    assert_refused(hasten("tune", "--prompts", str(tmp_path), "--seconds", value), "seconds")
    assert_refused(hasten("generate", "hi", "--method", f"draft-model:confidence={value}"), "confidence", "finite")
    out = str(tmp_path / "model")
    assert_refused(hasten("train", "lm", "--output", out, "--lr", value), "lr must be a finite number")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "hi"],
        ["race", "hi", "--rounds", "1", "--json"],
        ["verify", "--per-task", "1"],
        ["bench", "--suite", "copy", "--per-task", "1"],
        ["tune", "--prompts", "copy", "--seconds", "1"],
        ["sweep", "--model", "tiny-block", "--suite", "copy", "--per-task", "1", "--methods", "threshold"],
    ],
    ids=lambda command: command[0],
)
def test_a_cache_that_holds_no_request(hasten, monkeypatch: pytest.MonkeyPatch, command: list[str]):
    assert_refused(hasten(*command, "--cache-bytes", "much"), "cache_bytes must be a size", "'much'")
    assert_refused(hasten(*command, "--max-tokens", "4", "--cache-bytes", "1KiB"), "cache is full", "1,024 allowed")
    monkeypatch.setenv("HASTEN_CACHE_BYTES", "2kB")
    assert_refused(hasten(*command, "--max-tokens", "4"), "cache is full", "2,000 allowed")
