"""Each command as a user runs it: the JSON keys that others read, and what a person sees."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten import LLM
from hasten.model.checkpoint import resolve
from hasten.model.native.library import LIBRARY

PROMPT = "Reverse the list: red cat moon salt\nAnswer:"


def test_race(hasten):
    document = hasten("race", "--json", "--rounds", "1").json()
    assert [lane["method"] for lane in document["lanes"]] == ["plain", "ngram"]
    for lane in document["lanes"]:
        assert lane.keys() >= {"method", "tokens", "seconds", "tokens_per_second", "tokens_per_step"}
    plain, fast = document["lanes"]
    assert document["identical"] is True
    assert plain["tokens"] == fast["tokens"] > 20
    assert plain["tokens_per_step"] == 1
    # On the shipped edit most of the answer stands in the prompt: drafts must be accepted.
    assert fast["tokens_per_step"] > 2
    assert document["speedup"] > 0


def test_race_live_view(hasten):
    ran = hasten("race", PROMPT, "--rounds", "1", "--method", "draft-model", "--temperature", "0.5")
    assert ran.status == 0
    assert "identical: yes" in ran.out and "tokens per step" in ran.out


def test_race_picture(hasten, tmp_path: Path):
    picture = tmp_path / "race.svg"
    assert hasten("race", "--rounds", "1", "--svg", str(picture)).status == 0
    text = picture.read_text()
    assert text.startswith("<svg") and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_generate_json(hasten):
    ran = hasten("generate", PROMPT, "--json", "--method", "ngram", "--logprobs", "2")
    document = ran.json()
    keys = {"text", "token_ids", "finish_reason", "steps", "tokens_per_step", "seconds", "tokens_per_second"}
    assert document.keys() >= keys
    assert document["finish_reason"] == "stop"
    assert len(document["logprobs"]) == len(document["token_ids"])


def test_generate_streams_the_same_text(hasten):
    document = hasten("generate", PROMPT, "--json").json()
    assert hasten("generate", PROMPT, "--method", "draft-model").out == document["text"] + "\n"


def test_generate_reads_stdin(hasten, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert hasten("generate", "-", "--json").json()["text"] == hasten("generate", PROMPT, "--json").json()["text"]


def test_generate_choices_and_seed(hasten):
    command = ("generate", "import os\n", "--json", "--temperature", "1.2", "--n", "3", "--max-tokens", "12")
    first, again = (hasten(*command, "--seed", "5").json() for _ in range(2))
    other = hasten(*command, "--seed", "6").json()
    ids = [choice["token_ids"] for choice in first["choices"]]
    assert ids == [choice["token_ids"] for choice in again["choices"]]
    assert ids != [choice["token_ids"] for choice in other["choices"]]
    assert len({tuple(choice) for choice in ids}) > 1


def test_generate_stop_and_chat(hasten):
    whole = hasten("generate", PROMPT, "--json").json()["text"]
    word = whole.split()[1]
    cut = hasten("generate", PROMPT, "--json", "--stop", word).json()
    assert cut["text"] == whole[: whole.index(word)] and cut["finish_reason"] == "stop"
    chat = hasten("generate", PROMPT.removesuffix("\nAnswer:"), "--chat", "--json").json()
    assert chat["text"] == whole


def test_same_greedy_text_as_transformers(hasten):
    folder = resolve("tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.float().generate(inputs["input_ids"], max_new_tokens=64, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert hasten("generate", PROMPT, "--method", "plain", "--json").json()["text"] == expected


def test_methods(hasten):
    listed = hasten("methods", "--json").json()
    assert {"plain", "ngram", "draft-model"} <= {entry["slug"] for entry in listed}
    for entry in listed:
        assert entry.keys() >= {
            *("slug", "aliases", "role", "family", "exactness", "paper", "title", "needs_training", "command")
        }
    table = hasten("methods").out
    for role in ("drafters", "denoisers", "kernels", "recipes", "evaluations"):
        assert f"\n{role}" in f"\n{table}"
    for entry in listed:
        assert table.count(f"\n  {entry['slug']} ") == 1
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table


def test_one_method(hasten):
    (entry,) = hasten("methods", "suffix-decoding", "--json").json()
    assert (entry["slug"], entry["aliases"], entry["role"]) == ("suffix", ["suffix-decoding"], "drafter")
    shown = hasten("methods", "suffix-decoding").out
    for words in ("suffix, suffix-decoding", "lossless", "arXiv 2411.04975", "hasten bench --methods suffix"):
        assert words in shown
    for name, default in entry["parameters"].items():
        assert f"  {name}={default}\n" in shown
    assert entry["knob"] is None and "knob       -\n" in shown
    (entry,) = hasten("methods", "prophet", "--json").json()
    assert entry["knob"] == {"name": "scale", "values": [4, 2, 1, 0.5, 0.25], "scaled": ["early", "middle", "late"]}
    knob = "knob       scale (times early, middle, late), from careful to fast: 4, 2, 1, 0.5, 0.25\n"
    assert knob in hasten("methods", "prophet").out
    assert "hasten train scylla" in hasten("methods", "scylla").out
    refused = hasten("methods", "scyla")
    assert (refused.status, refused.out) == (2, "")
    assert "unknown method 'scyla'; did you mean scylla" in refused.err


def test_a_methods_defaults_for_a_model(hasten):
    for model, expected in (([], "suffix"), (["--model", "tiny"], "suffix/eagle:sized=false/draft-model")):
        assert hasten("methods", "auto", *model).out.endswith(f"  candidates={expected}\n")
        (entry,) = hasten("methods", "auto", *model, "--json").json()
        assert entry["parameters"] == {"candidates": expected}
    refused = hasten("methods", "--model", "tiny")
    assert (refused.status, refused.out) == (2, "") and "name the method" in refused.err


def test_every_command_of_the_list_names_a_model_that_its_method_is_for(hasten):
    """Made for the model, which is all that a method checks; the commands' own tests run them."""
    targets = {}
    for entry in hasten("methods", "--json").json():
        words = entry["command"].split()
        if "--methods" not in words:
            continue
        name = words[words.index("--model") + 1] if "--model" in words else "tiny"
        if name not in targets:
            targets[name] = LLM(name)
        assert words[words.index("--methods") + 1] == entry["slug"]
        targets[name].engine.drafter(entry["slug"])


def test_verify(hasten):
    ran = hasten("verify", "--method", "ngram", "--per-task", "1", "--max-tokens", "12", "--json")
    document = ran.json()
    assert ran.status == 0
    assert document["prompts"] == document["identical"] == 20
    assert document["first_divergence"] is None
    assert document["accepted"] > 0


@pytest.mark.parametrize("method", ["draft-model", "draft-model:width=2,length=3"])
def test_verify_prompt_file(hasten, tmp_path: Path, method: str):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in (PROMPT, "import os\nimport")))
    command = ("verify", "--method", method, "--prompts", str(prompts), "--max-tokens", "24", "--json")
    document = hasten(*command).json()
    assert document["prompts"] == document["identical"] == 2 and document["accepted"] > 0


def test_bench(hasten):
    methods = "ngram:length=6,maximum=3,draft-model"
    options = ("--per-task", "1", "--max-tokens", "12")
    rows = hasten("bench", "--methods", methods, "--suite", "lists", *options, "--json").json()["rows"]
    assert {row["method"] for row in rows} == {"plain", "ngram:length=6,maximum=3", "draft-model"}
    for row in rows:
        assert row.keys() >= {"method", "category", "tokens_per_step", "tokens_per_second", "speedup", "accuracy"}
        assert row["identical"] == row["prompts"]
    assert {row["category"] for row in rows} == {"lists", "overall"}
    assert "speedup" in hasten("bench", "--suite", "copy", *options).out


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
def test_the_native_backend_decodes_the_same(hasten):
    prompt = "Copy the list: red cat moon\nAnswer:"
    texts = [
        hasten("generate", prompt, "--max-tokens", "12", "--method", method, "--backend", backend, "--json").json()[
            "text"
        ]
        for backend in ("torch", "native")
        for method in ("plain", "ngram")
    ]
    assert len(set(texts)) == 1 and texts[0]


def test_doctor(hasten):
    document = hasten("doctor", "--json").json()
    assert document.keys() >= {"bandwidth_gbs", "step_ms", "roofline_ms", "verify_cost"}
    assert document["bandwidth_gbs"] > 0 and document["step_ms"] > 0 and document["roofline_ms"] > 0
    assert document["verify_cost"]["1"] == 1 and "32" in document["verify_cost"]
    assert document.get("invariance_price", 1.0) == 1.0
    assert document["token_cost"] == pytest.approx((document["verify_cost"]["8"] - 1) / 7, abs=1e-3)
    assert document["divergence"] is None


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
def test_doctor_says_what_rounding_costs(hasten, tmp_path: Path):
    found = hasten("doctor", "--weights", "int8", "--json").json()["divergence"]
    assert found["prompts"] == 10 and found["rows"] > 500
    assert found["kl"] > 0 and 0.5 < found["top1"] < 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Copy the list: red cat\nCopy the list: moon salt\n")
    exact = hasten("doctor", "--prompts", str(prompts), "--dtype", "float32")
    assert "rounding  KL 0.00000 from float32, the same likeliest token in 100.0% of" in exact.out
    ran = hasten("doctor", "--model", "tiny-diffusion", "--prompts", str(prompts))
    assert ran.status == 2 and "fill masked positions" in ran.err


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
def test_doctor_draws_every_precision(hasten, tmp_path: Path):
    document = hasten("doctor", "--picture", tmp_path / "doctor.svg", "--json").json()
    sizes = {name: found["weight_bytes"] for name, found in document["precisions"].items()}
    assert list(sizes) == ["float32", "bfloat16", "int8", "int4"]
    assert sizes["float32"] == 2 * sizes["bfloat16"] and sizes["int4"] < 0.65 * sizes["int8"]
    drawn = (tmp_path / "doctor.svg").read_text()
    assert drawn.startswith("<svg") and all(name in drawn for name in sizes)


def shell(folder: Path, *command: str | Path) -> str:
    """What a program prints, run elsewhere."""
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True).stdout


def test_the_installed_program_prints_one_document(tmp_path: Path):
    """From a shell: nothing but JSON on stdout."""
    program = Path(sys.executable).parent / "hasten"
    document = json.loads(shell(tmp_path, program, "generate", PROMPT, "--json", "--max-tokens", "4"))
    assert len(document["token_ids"]) == 4
    assert shell(tmp_path, sys.executable, "-m", "hasten", "--version") == shell(tmp_path, program, "--version")


def test_version_and_help(hasten):
    assert hasten("--version").out.startswith("hasten ")
    for command in ("race", "generate", "methods", "verify", "bench", "tune", "doctor", "train"):
        assert command in hasten("--help").out
