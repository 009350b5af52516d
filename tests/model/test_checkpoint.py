"""Whatever is wrong with a checkpoint or an argument, the user gets one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from hasten.catalogue.entries import CATALOGUE, shipped
from hasten.errors import UserError
from hasten.model import load_model
from hasten.model.checkpoint import INDEX, SINGLE, Tensors, resolve
from hasten.model.loading import choose_device
from hasten.model.native.library import LIBRARY
from hasten.model.tokenizer import load_tokenizer, same_vocabulary, vocabulary_digest

Make = Callable[..., Any]


@pytest.fixture
def folder(make_checkpoint: Make, tmp_path: Path) -> Path:
    """A good checkpoint in one file, to be spoilt."""
    copied = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("llama", num_hidden_layers=1).folder, copied)
    return copied


@pytest.fixture
def shards(make_checkpoint: Make, tmp_path: Path) -> Path:
    """A good checkpoint in several files, to be spoilt."""
    made = tmp_path / "shards"
    make_checkpoint("llama", num_hidden_layers=1).reference.save_pretrained(made, max_shard_size="40KB")
    return made


def refused(model: str | Path, *clues: str, **arguments: Any) -> str:
    """The sentence that loading fails with."""
    with pytest.raises(UserError) as caught:
        load_model(model, **{"device": "cpu", **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 500
    for clue in clues:
        assert clue in message
    return message


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def test_the_checkpoints_that_are_spoilt_here_are_good(folder: Path, shards: Path) -> None:
    assert len(load_model(folder, device="cpu").layers) == 1
    assert len(load_model(shards, device="cpu").layers) == 1


# The folder


@pytest.mark.parametrize("name", ["missing", "./missing", "../a/b", "/no/such/folder", "a/b/c", "~nobody/x"])
def test_missing_folder(name: str) -> None:
    refused(name, f"no checkpoint at {name!r}", "owner/name")


@pytest.mark.parametrize("name", ["x" * 5000, "null\0character"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load_model(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    refused(folder / SINGLE, "no checkpoint at", "no folder")


def test_folder_without_a_configuration(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/checkpoint") == folder


def test_shipped_models_go_by_their_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.catalogue.entries.ASSETS", folder.parent)
    (folder.parent / "notes").mkdir()
    assert shipped() == [folder.name]
    assert resolve(folder.name) == folder
    refused("chekpoint", "shipped", folder.name)
    refused("notes", folder.name)


def test_pulled_models_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then, what to do is said; a folder of the name is meant before them."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refused("smollm2", "not here yet", "`hasten pull smollm2`")
    file = CATALOGUE["smollm2"].path
    file.parent.mkdir()
    file.touch()
    assert resolve("smollm2") == file == tmp_path / "models" / "smollm2.gguf"
    (tmp_path / "smollm2").mkdir()
    assert resolve("smollm2") == Path("smollm2")


# The configuration


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"model_type": "llama"', b"\xff\xfe\x00", b"[1, 2]", b'"llama"', b"null"]
)
def test_corrupt_configuration(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json")


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", None, ["llama"]])
def test_unsupported_architecture(kind: object, folder: Path) -> None:
    edit_config(folder, model_type=kind)
    refused(folder, repr(kind), "not supported", "Dream, Fast_dLLM_Qwen, llada, llama, mistral, qwen2, qwen3, sdar")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "unheard-of", "rope_theta": 10000.0},
        {"rope_type": "proportional", "rope_theta": 10000.0},
    ],
)
def test_unsupported_rope(rope: dict[str, Any], folder: Path) -> None:
    edit_config(folder, rope_parameters=rope)
    refused(folder, repr(rope["rope_type"]), "default, linear, llama3, yarn, dynamic, longrope")


def test_rope_as_older_configurations_write_it(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(raw))
    frequencies = load_model(folder, device="cpu").config.inverse_frequencies
    assert frequencies == pytest.approx([0.5 * 500.0 ** (-2 * i / 12) for i in range(6)], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "clue"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -48}, "hidden_size -48"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_attention_heads": 5}, "heads"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "two"}}, "config.json"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "finite"),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "6 of 12 channels",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"]}, "'chunked_attention'"),
    ],
)
def test_unusable_fields(fields: dict[str, Any], clue: str, folder: Path) -> None:
    edit_config(folder, **fields)
    refused(folder, clue)


# The tensors


def test_no_safetensors(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, SINGLE, INDEX)


@pytest.mark.parametrize("size", [0, 5, 100, -1000])
def test_truncated_file(size: int, folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:size])
    refused(folder, SINGLE, "corrupt")


def test_a_file_that_is_something_else(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n" * 3)
    refused(folder, SINGLE, "corrupt")


def test_missing_shard(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    refused(shards, "misses the shard", gone.name)


def test_truncated_shard(shards: Path) -> None:
    bad = sorted(shards.glob("*.safetensors"))[1]
    bad.write_bytes(bad.read_bytes()[:-10])
    refused(shards, bad.name, "corrupt")


def test_a_shard_without_the_tensor_that_the_index_promises(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: files[0] for name in index["weight_map"]}
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, files[0])


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_corrupt_index(text: str, shards: Path) -> None:
    (shards / INDEX).write_text(text)
    refused(shards, INDEX)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"no tensor {name}")


@pytest.mark.parametrize(
    ("architecture", "settings", "name"),
    [
        ("qwen2", {}, "model.layers.0.self_attn.q_proj.bias"),
        ("qwen2", {}, "model.layers.0.self_attn.v_proj.bias"),
        ("qwen3", {}, "model.layers.0.self_attn.q_norm.weight"),
        ("llama", {"attention_bias": True}, "model.layers.0.self_attn.o_proj.bias"),
        ("llama", {"mlp_bias": True}, "model.layers.0.mlp.gate_proj.bias"),
    ],
)
def test_missing_tensor_that_only_some_architectures_have(
    architecture: str, settings: dict[str, Any], name: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(architecture, num_hidden_layers=1, **settings).folder, folder)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"no tensor {name}")


def test_no_biases_at_all_where_the_architecture_has_them(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("qwen2", num_hidden_layers=1).folder, folder)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "bias" in name])
    refused(folder, "no tensor model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"vocab_size": 98}, "model.embed_tokens.weight"),
        ({"hidden_size": 64, "head_dim": 12}, "model.embed_tokens.weight"),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight"),
        ({"num_attention_heads": 8}, "self_attn.q_proj.weight"),
        ({"num_attention_heads": 2}, "self_attn.q_proj.weight"),
        ({"head_dim": 24}, "self_attn.q_proj.weight"),
        ({"num_hidden_layers": 2}, "model.layers.1."),
    ],
)
def test_configuration_and_tensors_disagree(fields: dict[str, Any], tensor: str, folder: Path) -> None:
    edit_config(folder, **fields)
    refused(folder, tensor)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("spoil", [lambda weight: weight[1:], lambda weight: weight.unsqueeze(0)])
def test_tensor_of_another_shape(name: str, spoil: Callable[[Tensor], Tensor], folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: spoil(tensors[name]).contiguous()}))
    found = list(load_file(folder / SINGLE)[name].shape)
    refused(folder, name, str(found), "config.json asks for")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_quantised_tensors(dtype: torch.dtype, folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, name, "quantised")


def test_tensors_are_read_one_by_one(folder: Path) -> None:
    tensors = Tensors(folder, torch.float64, torch.device("cpu"))
    names = ["model.norm.weight", "model.layers.0.input_layernorm.weight"]
    assert names[0] in tensors
    assert "nothing" not in tensors
    assert tensors.maybe("nothing") is None
    assert tensors.maybe_stacked(["nothing", "nor this"]) is None
    stacked = tensors.stacked(names)
    assert stacked.dtype == torch.float64
    assert torch.equal(stacked, torch.cat([tensors.get(name) for name in names]))
    assert torch.equal(tensors.stacked(names, [(48,), (48,)]), stacked)
    with pytest.raises(UserError, match="no tensor nothing"):
        tensors.maybe_stacked([names[0], "nothing"])


def test_one_tensor_alone_is_not_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of tokens expanded from a GGUF file would be there twice for a while."""
    tensors, name = Tensors(folder, torch.float32, torch.device("cpu")), "model.norm.weight"
    known = tensors.get(name)
    monkeypatch.setattr(tensors, "get", lambda name, *shape: known)
    assert tensors.stacked([name]) is known


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_table_of_tokens_stays_in_the_mapped_file(folder: Path, backend: str) -> None:
    if backend == "native" and not LIBRARY.exists():
        pytest.skip("the native step was not built: no C++ compiler")
    model = load_model(folder, dtype="float32", backend=backend)
    place = model.embedding.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert any(start <= place < stop for start, stop in spans)


# NaN and infinity

WEIGHTS = (
    ("llama", "model.embed_tokens.weight"),
    ("llama", "model.layers.0.self_attn.q_proj.weight"),
    ("llama", "model.layers.0.self_attn.v_proj.weight"),
    ("llama", "model.layers.0.self_attn.o_proj.weight"),
    ("llama", "model.layers.0.mlp.gate_proj.weight"),
    ("llama", "model.layers.0.mlp.up_proj.weight"),
    ("llama", "model.layers.0.mlp.down_proj.weight"),
    ("llama", "model.layers.0.input_layernorm.weight"),
    ("llama", "model.layers.0.post_attention_layernorm.weight"),
    ("llama", "model.norm.weight"),
    ("llama", "lm_head.weight"),
    ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
    ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
    ("qwen3", "model.layers.0.self_attn.k_norm.weight"),
)
RUNS: tuple[dict[str, str], ...] = (
    *({"backend": "torch", "dtype": dtype} for dtype in ("float32", "bfloat16", "float16", "float64")),
    *({"backend": "native", "dtype": dtype} for dtype in ("float32", "bfloat16")),
    *({"weights": weights, "dtype": dtype} for weights in ("int8", "int4") for dtype in ("float32", "bfloat16")),
    {},
)


def put(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], None]:
    """An edit: the last number of a tensor is this, and all tensors are of this dtype."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.update({each: tensor.to(dtype) for each, tensor in tensors.items()})
        tensors[name].view(-1)[-1] = value

    return edit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("architecture", "name"), WEIGHTS)
def test_weights_that_are_no_numbers(
    architecture: str, name: str, value: float, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(architecture, num_hidden_layers=1).folder, folder)
    edit_tensors(folder, put(name, value))
    assert refused(folder) == f"{name} in {folder} holds NaN or infinity: the checkpoint is damaged"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_nan_is_refused_however_it_is_stored_and_run(run: dict[str, str], stored: torch.dtype, folder: Path) -> None:
    edit_tensors(folder, put("model.layers.0.mlp.down_proj.weight", float("nan"), stored))
    refused(folder, "model.layers.0.mlp.down_proj.weight", "NaN", str(folder), **run)


def test_nan_in_any_shard(shards: Path) -> None:
    for file in sorted(shards.glob("*.safetensors")):
        good = load_file(file)
        name = min(good)
        save_file({**good, name: torch.full_like(good[name], float("nan"))}, file)
        refused(shards, name, "NaN")
        save_file(good, file)
    load_model(shards, device="cpu")


@pytest.mark.parametrize(("value", "dtype"), [(1e38, "float16"), (70_000.0, "float16"), (3.4e38, "bfloat16")])
def test_weights_that_overflow_as_they_are_cast(value: float, dtype: str, folder: Path) -> None:
    edit_tensors(folder, put("model.norm.weight", value))
    refused(folder, f"model.norm.weight in {folder} overflows in {dtype}", dtype=dtype)
    edit_tensors(folder, put("model.norm.weight", 1.0))
    load_model(folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("piece", ["q_proj", "k_proj"])
def test_heads_whose_norms_would_hide_an_overflow(
    piece: str, run: dict[str, str], make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("qwen3", num_hidden_layers=1).folder, folder)
    name = f"model.layers.0.self_attn.{piece}.weight"
    edit_tensors(folder, put(name, 1e3))
    load_model(folder, device="cpu", **run)
    edit_tensors(folder, put(name, 1e18))
    if run.get("dtype") == "float64":
        load_model(folder, device="cpu", **run)
    else:
        refused(folder, name, "overflows", **run)


# Files elsewhere


@pytest.mark.parametrize("name", ["../{}", "{folder}/{}", "sub/../../{}", "sub/../{}", ".."])
def test_an_index_that_leaves_its_folder(name: str, shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    tensor, file = next(iter(index["weight_map"].items()))
    (shards / "sub").mkdir()
    shutil.copy(shards / file, shards.parent / file)
    index["weight_map"][tensor] = name.format(file, folder=shards.parent)
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, INDEX, "outside its folder", index["weight_map"][tensor])
    refused(shards, INDEX, "outside its folder", dtype="float32")


def test_links_as_in_the_cache_of_the_hub(shards: Path) -> None:
    blobs = shards.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate([*shards.glob("*.safetensors"), shards / INDEX, shards / "config.json"]):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert len(load_model(shards, device="cpu").layers) == 1


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_only_files_that_are_used_count(kind: str, request: pytest.FixtureRequest) -> None:
    place: Path = request.getfixturevalue(kind)
    edit_config(place, dtype="bfloat16")
    (place / "stray.safetensors").symlink_to("nowhere")
    with (place / "other.safetensors").open("wb") as other:
        other.truncate(2**27)
    assert load_model(place, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("spoil", [lambda file: file.symlink_to("nowhere"), os.mkfifo, Path.mkdir])
def test_a_needed_file_that_is_none(spoil: Callable[[Path], object], folder: Path, shards: Path) -> None:
    for place, file in ((folder, SINGLE), (shards, min(shards.glob("*.safetensors")).name), (shards, "config.json")):
        (place / file).unlink()
        spoil(place / file)
        refused(place, file)
        refused(place, file, dtype="float32")


# The arguments


@pytest.mark.parametrize("dtype", ["fp32", "int8", "", "torch.float32"])
def test_unknown_dtype(dtype: str, folder: Path) -> None:
    refused(folder, repr(dtype), "auto", "bfloat16", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "meta", "cpu:-1", "hpu"])
def test_unavailable_device(device: str, folder: Path) -> None:
    refused(folder, f"device {device!r} is not available", device=device)


def test_auto_is_a_device_that_exists() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected


# The tokenizer


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0", "model": {"type": "Unheard"}}'])
def test_corrupt_tokenizer(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert loaded.encode("b a", add_special_tokens=False) == [1, 0]
    assert same_vocabulary(loaded, load_tokenizer(str(folder)))
    assert vocabulary_digest(loaded) == vocabulary_digest(load_tokenizer(str(folder)))


# The hub


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    refused("hasten-tests/no-such-model", "cannot get 'hasten-tests/no-such-model' from the hub")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["spaces are/wrong", "owner/" + "x" * 100, "owner/--"])
def test_impossible_hub_id(name: str) -> None:
    refused(name, "from the hub")


class HttpLibraryError(Exception):
    """Stands for httpx's errors, which the hub lets through and which share no base with its own."""


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk full"),
        ValueError("bad\nvalue"),
        ConnectionError(""),
        HttpLibraryError("proxy says no"),
        TimeoutError("too slow"),
    ],
)
def test_failing_download(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused("owner/name", "cannot get 'owner/name' from the hub: ")


def test_loading_by_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **arguments: Any) -> str:
        asked.append((name, arguments))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_model("owner/name", device="cpu")
    assert len(model.layers) == 1
    assert [name for name, _ in asked] == ["owner/name"]
    repository = [
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "onnx/config.json",
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "modeling_own.py",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert list(filter_repo_objects(repository, **asked[0][1])) == [
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_a_folder_wins_over_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert resolve(f"{folder.parent.name}/{folder.name}").samefile(folder)
