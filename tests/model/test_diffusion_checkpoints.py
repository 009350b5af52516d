"""Diffusion language models load from the layouts they were published in, and from a section of config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten import LLM
from hasten.cache import Cache
from hasten.errors import UserError
from hasten.model import Decoder, DiffusionConfig, Rows, load_model
from hasten.model.cuda.backend import CudaBackend
from hasten.model.loading import read_config
from hasten.model.native.library import LIBRARY
from hasten.model.tokenizer import load_tokenizer
from helpers import make_tokenizer

Make = Callable[..., Any]
MASK, BLOCK = 90, 4

LLADA_FIELDS = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "d_model": 48,
    "embedding_size": 97,
    "eos_token_id": 2,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": MASK,
    "max_sequence_length": 512,
    "mlp_hidden_size": 80,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 97,
    "weight_tying": False,
}
LLADA_PARTS = {
    "model.embed_tokens": "model.transformer.wte",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
QWEN_FIELDS = {
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "mask_token_id": MASK,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 97,
}
LLAMA_FIELDS = {**QWEN_FIELDS, "model_type": "llama", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
        fields: its config.json.
        parent: transformers' architecture that computes the same, given the right mask.
        settings: that architecture's configuration, where it differs from the tests' usual one.
        parts: parts of its names of tensors, and what stands there instead.
    """

    fields: dict[str, Any]
    diffusion: DiffusionConfig
    parent: str
    settings: dict[str, Any]
    parts: dict[str, str]


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


LLADA = Layout(
    LLADA_FIELDS,
    DiffusionConfig("full", "same", MASK),
    "llama",
    {**rope(5e5), "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    LLADA_PARTS,
)
LAYOUTS = {
    "llada": LLADA,
    "llada-gqa": replace(
        LLADA, fields={**LLADA_FIELDS, "n_kv_heads": 2}, settings={**LLADA.settings, "num_key_value_heads": 2}
    ),
    "llada-tied": replace(
        LLADA,
        fields={**LLADA_FIELDS, "weight_tying": True},
        settings={**LLADA.settings, "tie_word_embeddings": True},
    ),
    "llada-padded-embedding": replace(LLADA, fields={**LLADA_FIELDS, "vocab_size": 93}),
    "Dream": Layout(
        {**QWEN_FIELDS, "model_type": "Dream"}, DiffusionConfig("full", "shifted", MASK), "qwen2", rope(1e6), {}
    ),
    "Fast_dLLM_Qwen": Layout(
        {**QWEN_FIELDS, "model_type": "Fast_dLLM_Qwen", "bd_size": BLOCK},
        DiffusionConfig("block-causal", "shifted", MASK, BLOCK),
        "qwen2",
        rope(1e6),
        {},
    ),
    "sdar": Layout(
        {**QWEN_FIELDS, "model_type": "sdar", "head_dim": 16, "block_size": BLOCK},
        DiffusionConfig("block-causal", "same", MASK, BLOCK),
        "qwen3",
        rope(1e6),
        {},
    ),
    "llama-section": Layout(
        {
            **{name: value for name, value in LLAMA_FIELDS.items() if name != "mask_token_id"},
            "diffusion": {
                "attention": "context-causal",
                "alignment": "shifted",
                "mask_token_id": MASK,
                "block_length": BLOCK,
            },
        },
        DiffusionConfig("context-causal", "shifted", MASK, BLOCK),
        "llama",
        rope(1e4),
        {},
    ),
}
NATIVE = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def renamed(name: str, parts: dict[str, str]) -> str:
    for theirs, published in parts.items():
        name = name.replace(f"{theirs}.", f"{published}.")
    return name


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    layout: Layout = request.param
    return layout


@pytest.fixture(scope="module")
def reference(layout: Layout, make_checkpoint: Make) -> Any:
    """transformers' model."""
    return make_checkpoint(layout.parent, num_hidden_layers=2, **layout.settings).reference


@pytest.fixture(scope="module")
def folder(layout: Layout, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights, as they are published."""
    made = write_config(tmp_path_factory.mktemp("published"), layout.fields)
    tied = reference.config.tie_word_embeddings
    weights = {
        renamed(name, layout.parts): weight.contiguous()
        for name, weight in reference.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, made / "model.safetensors")
    return made


@pytest.fixture(scope="module", params=["torch", pytest.param("native", marks=NATIVE)])
def model(request: pytest.FixtureRequest, folder: Path) -> Decoder:
    """The same by hasten."""
    return load_model(folder, dtype="float32", device="cpu", backend=request.param)


def some_tokens(count: int) -> list[int]:
    return torch.randint(0, 90, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def expected(reference: Any, tokens: list[int], seen: Tensor) -> Tensor:
    """transformers' logits, where row i sees the rows `seen[i]`."""
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits: Tensor = reference(torch.tensor([tokens]), attention_mask=additive[None, None]).logits[0]
    return logits


def rows_of(model: Decoder, sequence: Any, tokens: list[int], mask: Any) -> Rows:
    """The next rows of a sequence."""
    rows = Rows.of(sequence, tokens, sequence.length, model.device)
    rows.spans[0].mask = mask
    return rows


def new_sequence(model: Decoder) -> Any:
    return Cache(model.config.layers, model.cache_dtype, model.device).sequence()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=0)


def block_causal(count: int, block: int) -> Tensor:
    """Row i sees its own block and earlier ones."""
    blocks = torch.arange(count) // block
    return blocks[:, None] >= blocks


# What is computed


def test_rows_that_see_all_others(model: Decoder, reference: Any) -> None:
    tokens = [*some_tokens(8), MASK, MASK, *some_tokens(3)]
    ours = model.forward(rows_of(model, new_sequence(model), tokens, "all"))
    close(ours, expected(reference, tokens, torch.ones(13, 13, dtype=torch.bool)))


def test_blocks_that_see_earlier_ones(model: Decoder, reference: Any) -> None:
    """In one pass under a mask, and block by block behind a cache: the same logits."""
    tokens, sequence = [*some_tokens(9), MASK, MASK, MASK], new_sequence(model)
    seen = block_causal(12, BLOCK)
    theirs = expected(reference, tokens, seen)
    close(model.forward(rows_of(model, sequence, tokens, seen.to(model.device))), theirs)
    for start in range(0, 12, BLOCK):
        close(
            model.forward(rows_of(model, sequence, tokens[start : start + BLOCK], "all")), theirs[start : start + BLOCK]
        )
        sequence.commit(BLOCK)


def test_finished_rows_are_causal_and_a_block_sees_itself(model: Decoder, reference: Any) -> None:
    tokens, sequence = [*some_tokens(7), MASK, MASK, MASK, MASK], new_sequence(model)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    seen[7:, 7:] = True
    theirs = expected(reference, tokens, seen)
    close(model.forward(rows_of(model, sequence, tokens[:7], None)), theirs[:7])
    sequence.commit(7)
    close(model.forward(rows_of(model, sequence, tokens[7:], "all")), theirs[7:])


@pytest.mark.parametrize("layout", [LLADA], indirect=True, ids=["llada"])
def test_the_gpu_backend_runs_them(folder: Path, reference: Any) -> None:
    """Its kernels run in their interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = replace(load_model(folder, "float32", device, "torch"), backend=CudaBackend())
    tokens = [*some_tokens(3), MASK, MASK]
    ours = model.forward(rows_of(model, new_sequence(model), tokens, "all"))
    close(ours, expected(reference, tokens, torch.ones(5, 5, dtype=torch.bool)))


# What is read


def test_what_is_known_of_a_layout(layout: Layout, folder: Path) -> None:
    assert read_config(folder).diffusion == layout.diffusion


def test_an_autoregressive_model_has_none(make_checkpoint: Make) -> None:
    assert read_config(make_checkpoint("llama").folder).diffusion is None


RELEASED = {
    "llada": (
        {name: value for name, value in LLADA_FIELDS.items() if name not in ("mask_token_id", "embedding_size")}
        | {"vocab_size": 126464},
        DiffusionConfig("full", "same", 126336),
        (126348,),
    ),
    "Dream": ({"vocab_size": 152064}, DiffusionConfig("full", "shifted", 151666), (151645,)),
    "Fast_dLLM_Qwen": ({"vocab_size": 151936}, DiffusionConfig("block-causal", "shifted", 151665, 32), ()),
    "sdar": ({"vocab_size": 151936, "block_size": 4}, DiffusionConfig("block-causal", "same", 151669, 4), ()),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_special_tokens_of_the_released_vocabularies_are_known(kind: str, tmp_path: Path) -> None:
    fields, diffusion, end_ids = RELEASED[kind]
    plain = {} if kind == "llada" else {name: QWEN_FIELDS[name] for name in QWEN_FIELDS if name != "mask_token_id"}
    config = read_config(write_config(tmp_path, {**plain, **fields, "model_type": kind}))
    assert (config.diffusion, config.end_ids) == (diffusion, end_ids)


@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_other_vocabularies_have_end_tokens_of_their_own(kind: str, tmp_path: Path) -> None:
    assert read_config(write_config(tmp_path, LAYOUTS[kind].fields)).end_ids == ()


SECTIONS: list[tuple[dict[str, Any], dict[str, Any], DiffusionConfig]] = [
    # A section completes what is known, and wins over it.
    (
        {**LAYOUTS["sdar"].fields, "block_size": None},
        {"block_length": 7},
        DiffusionConfig("block-causal", "same", MASK, 7),
    ),
    (LAYOUTS["sdar"].fields, {"block_length": 7}, DiffusionConfig("block-causal", "same", MASK, 7)),
    (LLADA_FIELDS, {"mask_token_id": 3}, DiffusionConfig("full", "same", 3)),
    (LAYOUTS["Dream"].fields, {"alignment": "same"}, DiffusionConfig("full", "same", MASK)),
    (
        LAYOUTS["Dream"].fields,
        {"attention": "block-causal", "block_length": 1},
        DiffusionConfig("block-causal", "shifted", MASK, 1),
    ),
    # Null is as good as absent.
    (LLADA_FIELDS, {"mask_token_id": None, "block_length": None}, DiffusionConfig("full", "same", MASK)),
    # Alone, with any architecture.
    *(
        (
            {**QWEN_FIELDS, "model_type": kind, "sliding_window": None},
            {"attention": "full", "alignment": "same", "mask_token_id": 96},
            DiffusionConfig("full", "same", 96),
        )
        for kind in ("llama", "mistral", "qwen2", "qwen3")
    ),
]


@pytest.mark.parametrize(("fields", "section", "diffusion"), SECTIONS)
def test_a_section_of_the_configuration(
    fields: dict[str, Any], section: dict[str, Any], diffusion: DiffusionConfig, tmp_path: Path
) -> None:
    assert read_config(write_config(tmp_path, {**fields, "diffusion": section})).diffusion == diffusion


# What is refused


FULL = {"attention": "full", "alignment": "same", "mask_token_id": MASK}
WITHOUT_MASK = {name: value for name, value in LLADA_FIELDS.items() if name != "mask_token_id"}
REFUSALS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # Nothing is guessed, and the sentence says what to write.
    (LLAMA_FIELDS, {"diffusion": {}}, ["attention (full or block-causal or", "alignment (same or", "mask_token_id ("]),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "mask_token_id": None}}, ["write mask_token_id", '"diffusion"']),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "attention": "context-causal"}}, ["write block_length", '"diffusion"']),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "attention": "block-causal"}}, ["write block_length", '"diffusion"']),
    (WITHOUT_MASK, {}, ["this llada model", "write mask_token_id"]),
    (WITHOUT_MASK, {"embedding_size": 126465}, ["this llada model", "write mask_token_id"]),
    (LAYOUTS["sdar"].fields, {"block_size": None}, ["this sdar model", "write block_length"]),
    # A released mask token in a vocabulary that does not have it.
    (LAYOUTS["Dream"].fields, {"mask_token_id": 97}, ["mask token 97", "vocabulary of 97", "write mask_token_id"]),
    (LAYOUTS["Fast_dLLM_Qwen"].fields, {"mask_token_id": -1}, ["mask token -1"]),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "mask_token_id": "<mask>"}}, ["mask token <mask>"]),
    (LAYOUTS["Fast_dLLM_Qwen"].fields, {"bd_size": 0}, ["block has 0 positions"]),
    (LAYOUTS["sdar"].fields, {"block_size": 4.0}, ["block has 4.0 positions"]),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "block_length": -2}}, ["block has -2 positions"]),
    # The section itself.
    (LLAMA_FIELDS, {"diffusion": {**FULL, "mask_id": 3}}, ["'mask_id'", "mask_token_id, block_length"]),
    (LLAMA_FIELDS, {"diffusion": [FULL]}, ["no section"]),
    (LLAMA_FIELDS, {"diffusion": False}, ["no section"]),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "attention": "causal"}}, ["attention 'causal'", "context-causal"]),
    (LLAMA_FIELDS, {"diffusion": {**FULL, "alignment": ["same"]}}, ["alignment ['same']", "same or shifted"]),
    (LAYOUTS["Dream"].fields, {"use_sliding_window": True, "max_window_layers": 0}, ["sliding window"]),
    # LLaDA's own fields, under their own names.
    *(
        (LLADA_FIELDS, {name: True}, [f"{name} True"])
        for name in (
            "alibi",
            "attention_layer_norm",
            "bias_for_layer_norm",
            "include_bias",
            "include_qkv_bias",
            "input_emb_norm",
            "multi_query_attention",
            "scale_logits",
        )
    ),
    (LLADA_FIELDS, {"block_type": "sequential"}, ["block_type 'sequential'", "'llama'"]),
    (LLADA_FIELDS, {"layer_norm_type": "default"}, ["layer_norm_type 'default'", "'rms'"]),
    (LLADA_FIELDS, {"rope": False}, ["rope False"]),
    (LLADA_FIELDS, {"activation_type": "gelu"}, ["'gelu'"]),
    *((LLADA_FIELDS, {name: None}, [f"{name} None"]) for name in ("d_model", "n_layers", "max_sequence_length")),
    (LLADA_FIELDS, {"mlp_hidden_size": 0}, ["mlp_hidden_size 0"]),
]


@pytest.mark.parametrize(("fields", "changes", "clues"), REFUSALS)
def test_refusals(fields: dict[str, Any], changes: dict[str, Any], clues: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_config(write_config(tmp_path, {**fields, **changes}))
    message = str(caught.value)
    assert "\n" not in message
    for clue in clues:
        assert clue in message


def test_a_missing_tensor_goes_by_its_published_name(make_checkpoint: Make, tmp_path: Path) -> None:
    weights = make_checkpoint("llama", num_hidden_layers=2, **LLADA.settings).reference.state_dict()
    kept = {renamed(name, LLADA_PARTS): weight for name, weight in weights.items() if "layers.1.mlp.down" not in name}
    save_file(kept, write_config(tmp_path, LLADA_FIELDS) / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.transformer\.blocks\.1\.ff_out\.weight"):
        load_model(tmp_path, device="cpu")


# Text


def write_tokenizer(folder: Path, **fields: Any) -> None:
    """A tokenizer whose configuration says this."""
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_end_of_a_turn_ends_the_text_too(tmp_path: Path) -> None:
    """A LLaDA with the released vocabulary, its embedding shrunk to 2 channels."""
    fields = {**LLADA_FIELDS, "d_model": 2, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "mlp_hidden_size": 2}
    fields |= {"vocab_size": 126464, "embedding_size": 126464, "eos_token_id": 126081, "weight_tying": True}
    block = "model.transformer.blocks.0"
    square = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    weights = {f"{block}.{name}.weight": torch.eye(2) for name in square}
    weights |= {f"{block}.{name}.weight": torch.ones(2) for name in ("attn_norm", "ff_norm")}
    weights |= {"model.transformer.wte.weight": torch.ones(126464, 2), "model.transformer.ln_f.weight": torch.ones(2)}
    save_file(weights, write_config(tmp_path, fields) / "model.safetensors")
    write_tokenizer(tmp_path)
    # The tokenizer says an end of its own.
    assert LLM(tmp_path, device="cpu").engine.end_ids == {1, 126081, 126348}


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "DreamTokenizer"])
def test_code_that_a_checkpoint_brings_is_not_run(name: str, tmp_path: Path) -> None:
    """Nor does anybody ask whether it may be; transformers' own class reads the files."""
    code = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Tokenizer", None]}
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    write_config(tmp_path, {**LLADA_FIELDS, "auto_map": code})
    write_tokenizer(tmp_path, tokenizer_class=name, auto_map=code)
    text = "the cat and the moon"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == make_tokenizer()(text)["input_ids"]


def test_a_tokenizer_that_is_code_is_refused(tmp_path: Path) -> None:
    code = {"AutoTokenizer": ["code.Tokenizer", None]}
    write_config(tmp_path, {**LLADA_FIELDS, "auto_map": code})
    write_tokenizer(tmp_path, tokenizer_class="OwnTokenizer", auto_map=code)
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
