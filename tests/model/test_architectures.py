"""Every supported architecture gives transformers' logits, however the rows are cut and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.cache import Cache, SequenceCache
from hasten.model import Decoder, Rows, Span, Taps, load_model
from hasten.model.native.library import LIBRARY
from helpers import PeakBytes

Make = Callable[..., Any]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 20}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-rope-llama3": (
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-rope-yarn": (
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-upper-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-upper-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 2}),
}


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def new_sequence(model: Decoder) -> SequenceCache:
    return Cache(model.config.layers, model.cache_dtype, model.device).sequence()


def prefill(model: Decoder, tokens: list[int], chunks: list[int] | None = None) -> Tensor:
    """Logits of all tokens, fed in chunks of the given sizes."""
    sequence, pieces = new_sequence(model), []
    for size in chunks or [len(tokens)]:
        start = sequence.length
        pieces.append(model.forward(Rows.of(sequence, tokens[start : start + size], start)))
        sequence.commit(size)
    return torch.cat(pieces)


NATIVE = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")
BACKENDS = ["torch", pytest.param("native", marks=NATIVE)]


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest, make_checkpoint: Make, backend: str) -> tuple[Any, Decoder]:
    """(checkpoint, the same loaded by hasten in float32)."""
    architecture, settings = CASES[request.param]
    checkpoint = make_checkpoint(architecture, **settings)
    return checkpoint, load_model(checkpoint.folder, dtype="float32", device="cpu", backend=backend)


@pytest.fixture(scope="module")
def plain(make_checkpoint: Make, backend: str) -> tuple[Any, Decoder]:
    checkpoint = make_checkpoint("llama")
    return checkpoint, load_model(checkpoint.folder, dtype="float32", device="cpu", backend=backend)


def load_like(model: Decoder, folder: Path) -> Decoder:
    return load_model(folder, dtype="float32", device="cpu", backend=model.backend.name)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_logits_are_those_of_transformers(case: tuple[Any, Decoder]) -> None:
    checkpoint, model = case
    tokens = some_tokens(100)
    close(prefill(model, tokens), checkpoint.logits(tokens))


def test_chunks_and_single_rows_give_the_logits_of_one_piece(case: tuple[Any, Decoder]) -> None:
    _, model = case
    tokens = some_tokens(80, seed=1)
    whole = prefill(model, tokens)
    close(prefill(model, tokens, [1] * 80), whole)
    close(prefill(model, tokens, [3, 66, 1, 10]), whole)


def test_packed_sequences_give_the_logits_of_each_alone(case: tuple[Any, Decoder]) -> None:
    _, model = case
    texts = [some_tokens(length, seed=length) for length in (5, 70, 1, 23)]
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    # The second sequence has a past of its own, so a prefill chunk runs beside prompts.
    past = [0, 30, 0, 11]
    sequences = [cache.sequence() for _ in texts]
    for sequence, text, done in zip(sequences, texts, past, strict=True):
        if done:
            model.forward(Rows.of(sequence, text[:done], 0))
            sequence.commit(done)
    rows = pack(sequences, [text[done:] for text, done in zip(texts, past, strict=True)])
    logits = model.forward(rows)
    for span, text, done in zip(rows.spans, texts, past, strict=True):
        close(logits[span.start : span.stop], prefill(model, text)[done:])


def pack(sequences: list[SequenceCache], texts: list[list[int]]) -> Rows:
    """Each text as a causal chain behind its sequence."""
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    for sequence, text in zip(sequences, texts, strict=True):
        spans.append(Span(sequence, len(tokens), len(tokens) + len(text)))
        tokens += text
        positions += range(sequence.length, sequence.length + len(text))
    return Rows(torch.tensor(tokens), torch.tensor(positions), spans)


def test_bfloat16_errs_no_more_than_transformers(case: tuple[Any, Decoder], tmp_path: Path) -> None:
    checkpoint, _ = case
    rounded = copy.deepcopy(checkpoint.reference).to(torch.bfloat16)
    rounded.save_pretrained(tmp_path)
    tokens = some_tokens(64, seed=2)
    with torch.inference_mode():
        theirs = rounded(torch.tensor([tokens])).logits[0].float()
    exact = prefill(load_model(tmp_path, dtype="float32", device="cpu"), tokens)
    model = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.cache_dtype == torch.float32
    allowed = 1.5 * (theirs - exact).abs().mean()
    assert (prefill(model, tokens) - exact).abs().mean() <= allowed
    assert (prefill(model, tokens, [1] * 4 + [60]) - exact).abs().mean() <= allowed


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes(dtype: str, plain: tuple[Any, Decoder]) -> None:
    checkpoint, _ = plain
    model = load_model(checkpoint.folder, dtype=dtype, device="cpu")
    tokens = some_tokens(40, seed=3)
    logits = prefill(model, tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, checkpoint.logits(tokens), atol=1e-4 if dtype == "float64" else 0.1, rtol=0)


def test_shards_load_like_one_file(plain: tuple[Any, Decoder], tmp_path: Path) -> None:
    checkpoint, model = plain
    checkpoint.reference.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = some_tokens(20, seed=4)
    assert torch.equal(prefill(load_like(model, tmp_path), tokens), prefill(model, tokens))


def test_auto_is_float32_for_small_models_on_cpu(plain: tuple[Any, Decoder], tmp_path: Path) -> None:
    checkpoint, _ = plain
    copy.deepcopy(checkpoint.reference).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").dtype == torch.float32


def test_auto_is_what_a_large_checkpoint_says(
    plain: tuple[Any, Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = plain
    monkeypatch.setattr("hasten.model.loading.SMALL_MODEL_BYTES", 0)
    copy.deepcopy(checkpoint.reference).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.bfloat16
    assert load_model(checkpoint.folder, device="cpu").dtype == torch.float32


def test_a_head_of_its_own_wins_over_a_configuration_that_ties(plain: tuple[Any, Decoder], tmp_path: Path) -> None:
    checkpoint, model = plain
    checkpoint.reference.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    said, wrong = '"tie_word_embeddings": false', '"tie_word_embeddings": true'
    assert said in config.read_text()
    config.write_text(config.read_text().replace(said, wrong))
    tokens = some_tokens(9)
    assert torch.equal(prefill(load_like(model, tmp_path), tokens), prefill(model, tokens))


def test_weight_bytes_counts_what_a_pass_reads(plain: tuple[Any, Decoder]) -> None:
    checkpoint, model = plain
    matrices = sum(
        weight.nbytes
        for name, weight in checkpoint.reference.named_parameters()
        if weight.dim() == 2 and "embed" not in name
    )
    assert model.weight_bytes() == matrices


@pytest.mark.parametrize("rows", [1, 50, 150])
@pytest.mark.parametrize("name", CASES)
def test_what_a_pass_takes_for_a_while(make_checkpoint: Make, name: str, rows: int) -> None:
    """Of pieces of prompts, and of levels of trees, as PyTorch holds them; what the native step holds is not seen."""
    architecture, settings = CASES[name]
    folder = make_checkpoint(architecture, **settings).folder
    for dtype in ("float32", "bfloat16"):
        model = load_model(folder, dtype=dtype, device="cpu", backend="torch")
        sequences = [new_sequence(model) for _ in range(2)]
        for sequence in sequences:
            sequence.reserve(400)
            model.forward(Rows.of(sequence, some_tokens(40), 0), [])
            sequence.commit(40)
        tokens, positions = torch.tensor(some_tokens(2 * rows)), torch.arange(40, 40 + rows).repeat(2)
        for masked in (0, rows):
            mask = torch.eye(rows, dtype=torch.bool) if masked else None
            spans = [Span(each, index * rows, (index + 1) * rows, mask) for index, each in enumerate(sequences)]
            with PeakBytes() as peak:
                model.forward(Rows(tokens, positions, spans), [0])
            said = model.scratch_bytes(2 * rows, masked, 40 + rows) + 4 * model.config.vocab_size
            assert peak.most <= said < 4 * peak.most


@pytest.mark.parametrize("wanted", [[4], [0, 4], [4, 3, 2, 1, 0], [2, 2, 2, 2, 2], [1] * 9, [-1], []])
def test_wanted_rows(wanted: list[int], plain: tuple[Any, Decoder]) -> None:
    _, model = plain
    tokens = some_tokens(5)
    every = prefill(model, tokens)
    logits = model.forward(Rows.of(new_sequence(model), tokens, 0), wanted=wanted)
    assert logits.shape == (len(wanted), 97)
    torch.testing.assert_close(logits, every[wanted], atol=1e-5, rtol=0)


def test_rows_may_enter_as_embeddings(plain: tuple[Any, Decoder]) -> None:
    _, model = plain
    tokens = some_tokens(12)
    rows = Rows.of(new_sequence(model), tokens, 0)
    embedded = torch.tensor([False, True, True, False] * 3)
    rows.embeddings = torch.where(embedded.unsqueeze(-1), model.embed(rows), torch.nan)
    rows.tokens = rows.tokens.masked_fill(embedded, -1)
    assert torch.equal(model.forward(rows), prefill(model, tokens))


def test_positions_are_the_rows_own(plain: tuple[Any, Decoder]) -> None:
    """Rotary embedding is relative: a text gives the same logits wherever it starts, but not with gaps."""
    _, model = plain
    tokens = some_tokens(10)
    sequence = new_sequence(model)
    first = model.forward(Rows.of(sequence, tokens[:4], 300))
    sequence.commit(4)
    second = model.forward(Rows.of(sequence, tokens[4:], 304))
    close(torch.cat([first, second]), prefill(model, tokens))
    gap = model.forward(Rows.of(sequence, tokens[4:], 350))
    assert (gap - second).abs().max() > 1e-2


# Taps


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-upper-window", "qwen3"])
def test_taps_are_the_hidden_states_of_transformers(name: str, make_checkpoint: Make) -> None:
    architecture, settings = CASES[name]
    checkpoint = make_checkpoint(architecture, **settings)
    model = load_model(checkpoint.folder, dtype="float32", device="cpu")
    tokens = some_tokens(30, seed=5)
    theirs: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, layer: int, module: torch.nn.Module) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            theirs[site, layer] = state.reshape(len(tokens), -1)

        return module.register_forward_hook(hook)

    hooks = []
    for index, layer in enumerate(checkpoint.reference.model.layers):
        hooks += [
            keep("attention_input", index, layer.input_layernorm),
            keep("attention_output", index, layer.self_attn),
            keep("mlp_input", index, layer.post_attention_layernorm),
            keep("output", index, layer),
        ]
    with torch.inference_mode():
        states = checkpoint.reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    for index in range(len(model.layers)):
        theirs["input", index] = states[index][0]
    theirs["final_norm", 0] = states[-1][0]

    taps = Taps(theirs)  # type: ignore[arg-type]
    logits = model.forward(Rows.of(new_sequence(model), tokens, 0), wanted=[29], taps=taps)
    assert logits.shape == (1, 97)
    assert taps.states.keys() == theirs.keys()
    for key, state in theirs.items():
        torch.testing.assert_close(taps[key], state, atol=1e-4, rtol=1e-5, msg=str(key))  # type: ignore[index]


def test_taps_keep_only_what_was_asked_for(plain: tuple[Any, Decoder]) -> None:
    _, model = plain
    taps = Taps([("output", 1)])
    model.forward(Rows.of(new_sequence(model), some_tokens(4), 0), taps=taps)
    assert list(taps.states) == [("output", 1)]
    assert taps["output", 1].shape == (4, 48)


def test_an_unknown_tap_site_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tap site 'residual'"):
        Taps([("residual", 0)])  # type: ignore[list-item]


def test_the_pieces_compose_to_the_default_forward(plain: tuple[Any, Decoder]) -> None:
    """What a method does that composes the pieces itself, outside of inference mode."""
    _, model = plain
    tokens = some_tokens(15)
    sequence = new_sequence(model)
    for chunk in (tokens[:9], tokens[9:]):
        rows = Rows.of(sequence, chunk, sequence.length)
        step = model.start(rows)
        x = model.embed(rows)
        for layer in model.layers:
            x = layer.forward(x, step)
        logits = model.logits(x, None)
        sequence.commit(len(chunk))
    close(logits, prefill(model, tokens)[9:])


def test_rows_that_see_all_others_are_those_of_transformers_without_a_causal_mask(plain: tuple[Any, Decoder]) -> None:
    """In one piece, and with the first rows in the cache."""
    checkpoint, model = plain
    tokens, sequence = some_tokens(11), new_sequence(model)
    with torch.no_grad():
        expected = checkpoint.reference(torch.tensor([tokens]), attention_mask=torch.zeros(1, 1, 11, 11)).logits[0]
    for first in (0, 7):
        rows = Rows.of(sequence, tokens[first:], first)
        rows.spans[0].mask = "all"
        close(model.forward(rows), expected[first:])
        sequence.commit(7 if first == 0 else 0)
