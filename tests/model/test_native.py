"""The native step: the same bits for a row whatever stands beside it, on every instruction set, and clear refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, chosen

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache
from hasten.model import Decoder, Rows, Span, Taps, load_model
from hasten.model.layers import RMSNorm
from hasten.model.linear import DenseLinear
from hasten.model.loading import read_config
from hasten.model.native import library, refusal
from hasten.model.native.drafting import chain
from hasten.model.native.library import LIBRARY
from hasten.model.native.linear import PanelLinear
from hasten.model.native.structs import STRUCTS

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")


PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "int4": {"dtype": "bfloat16", "weights": "int4"},
}


@pytest.fixture(params=PRECISIONS, scope="module")
def model(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Any]) -> Decoder:
    checkpoint = make_checkpoint("llama", intermediate_size=80)
    return load_model(checkpoint.folder, device="cpu", backend="native", **PRECISIONS[request.param])


def dense_twin(native: Decoder, twin: Decoder) -> Decoder:
    """`twin`, run by PyTorch, with the weights that the panels of `native` stand for, in float32."""

    def dense(piece: Any) -> DenseLinear:
        return DenseLinear(piece.dequant().float(), piece.bias)

    def norm(piece: Any) -> RMSNorm:
        return RMSNorm(piece.weight.float(), piece.eps)

    for mine, theirs in zip(native.layers, twin.layers, strict=True):
        theirs.mixer.qkv, theirs.mixer.out = dense(mine.mixer.qkv), dense(mine.mixer.out)
        theirs.mlp.gate_up, theirs.mlp.down = dense(mine.mlp.gate_up), dense(mine.mlp.down)
        theirs.mixer_norm, theirs.mlp_norm = norm(mine.mixer_norm), norm(mine.mlp_norm)
        if mine.mixer.query_norm is not None:
            theirs.mixer.query_norm = norm(mine.mixer.query_norm)
            theirs.mixer.key_norm = norm(mine.mixer.key_norm)
    twin.embedding, twin.norm, twin.head = native.embedding.float(), norm(native.norm), dense(native.head)
    return twin


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("place", ["qkv", "out", "gate_up", "down", "head"])
@pytest.mark.parametrize(("kind", "options"), [(DenseLinear, {}), (PanelLinear, {"bias": None, "format": "float32"})])
def test_a_linear_layer_of_another_kind_runs_through_its_own_forward(kind, options, place, layer, make_checkpoint):
    """One twin among panels, dense or derived from them: the pieces are composed, the others keep their panels."""
    folder = make_checkpoint("llama", intermediate_size=80).folder
    native, mixed = (load_model(folder, "float32", "cpu", "native") for _ in range(2))
    calls = []

    class Counted(kind):
        def forward(self, rows):
            calls.append(rows.shape[0])
            return super().forward(rows)

        def forward_add(self, rows, residual):
            return residual + self.forward(rows)

    holder = mixed if place == "head" else mixed.layers[layer]
    if place != "head":
        holder = holder.mixer if place in ("qkv", "out") else holder.mlp
    setattr(holder, place, Counted(getattr(holder, place).dequant(), **options))
    assert native.backend.runs(native) and not mixed.backend.runs(mixed)
    logits = []
    for model in (native, mixed):
        cache = Cache(model.config.layers, model.cache_dtype, model.device)
        logits.append(model.forward(Rows.of(behind(model, cache, 20), tokens(7, 1), 20)))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
    assert calls == [20, 7]


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def behind(model: Decoder, cache: Cache, count: int, seed: int = 0):
    """A sequence that holds so many tokens."""
    sequence = cache.sequence()
    if count:
        model.forward(Rows.of(sequence, tokens(count, seed), 0))
        sequence.commit(count)
    return sequence


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_beside_any_others(model, threads):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    text, known = tokens(64, 1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sequence = behind(model, cache, 37)
        whole = model.forward(Rows.of(sequence, text, 37))
        for rows in (1, 2, 3, 5, 8, 12, 13, 24, 31, 63):
            assert torch.equal(model.forward(Rows.of(sequence, text[:rows], 37)), whole[:rows])
        # One by one, as plain decoding does.
        for row in range(20):
            assert torch.equal(model.forward(Rows.of(sequence, text[row : row + 1], 37 + row))[0], whole[row])
            sequence.commit(1)
    finally:
        torch.set_num_threads(known)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128])
def test_heads_of_any_width_attend_alike_alone_and_beside_others(head_dim, make_checkpoint):
    folder = make_checkpoint("qwen3", head_dim=head_dim).folder
    native, composed = (load_model(folder, "float32", "cpu", backend) for backend in ("native", "torch"))
    text, logits = tokens(70, 6), []
    for model in (native, composed):
        sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
        logits.append(model.forward(Rows.of(sequence, text, 0)))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    sequence = Cache(native.config.layers, native.cache_dtype, native.device).sequence()
    for start, stop in ((0, 1), (1, 2), (2, 17), (17, 18), (18, 33), (33, 36), (36, 64), (64, 70)):
        assert torch.equal(native.forward(Rows.of(sequence, text[start:stop], start)), logits[0][start:stop])
        sequence.commit(stop - start)


def test_neighbours_change_no_bit(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    one, other = behind(model, cache, 20), behind(model, cache, 50, seed=5)
    alone = model.forward(Rows.of(one, tokens(4, 2), 20))
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    spans = [Span(one, 0, 4), Span(other, 4, 7, mask)]
    positions = torch.tensor([20, 21, 22, 23, 50, 51, 51])
    packed = model.forward(Rows(torch.tensor([*tokens(4, 2), 7, 8, 9]), positions, spans))
    assert torch.equal(packed[:4], alone)
    # Nor does a prompt.
    fresh = cache.sequence()
    long = tokens(73, 3)
    spans = [Span(fresh, 0, len(long)), Span(one, len(long), len(long) + 4)]
    positions = torch.tensor([*range(len(long)), 20, 21, 22, 23])
    wanted = [len(long) + 3, 0, len(long) - 1, len(long)]
    mixed = model.forward(Rows(torch.tensor([*long, *tokens(4, 2)]), positions, spans), wanted)
    assert torch.equal(mixed[[3, 0]], alone[[0, 3]])
    assert torch.equal(mixed[[1, 2]], model.forward(Rows.of(cache.sequence(), long, 0))[[0, -1]])


def test_a_tree_gives_each_path_its_chain(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    sequence = behind(model, cache, 11)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    ids, positions = torch.tensor([3, 4, 5, 6]), torch.tensor([11, 12, 12, 13])
    tree = model.forward(Rows(ids, positions, [Span(sequence, 0, 4, mask)]))
    assert torch.equal(model.forward(Rows.of(sequence, [3, 4], 11)), tree[:2])
    assert torch.equal(model.forward(Rows.of(sequence, [3, 5, 6], 11)), tree[[0, 2, 3]])


def test_no_rows_give_no_logits(model):
    none = torch.zeros(0, dtype=torch.int64)
    assert model.forward(Rows(none, none, [])).shape == (0, 97)


def test_a_prompt_in_pieces_is_the_prompt(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    text = tokens(90, 4)
    whole = model.forward(Rows.of(cache.sequence(), text, 0))
    sequence = cache.sequence()
    for start, stop in ((0, 7), (7, 60), (60, 61), (61, 90)):
        assert torch.equal(model.forward(Rows.of(sequence, text[start:stop], start)), whole[start:stop])
        sequence.commit(stop - start)


def test_taps_change_no_bit(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    taps = Taps([("input", 0), ("output", 2), ("final_norm", 0)])
    tapped = model.forward(Rows.of(cache.sequence(), tokens(9), 0), taps=taps)
    assert torch.equal(tapped, model.forward(Rows.of(cache.sequence(), tokens(9), 0)))
    assert torch.equal(taps["input", 0], model.embedding[tokens(9)])
    assert taps["final_norm", 0].dtype == model.dtype
    # The pieces by themselves, over the same panels: bf16 is rounded at other places.
    error = (model.head.forward(taps["final_norm", 0]).float() - tapped).norm() / tapped.norm()
    assert error < (1e-6 if model.dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["ngram:minimum=1", "draft-model:confidence=0", "suffix", "token-recycling"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_methods_give_plain_decodings_tokens(tiny, precision, method, temperature):
    llm = LLM(tiny, backend="native", **PRECISIONS[precision])
    prompts = [[2, 3, 4] * 4, [9] * 7, list(range(10, 30))]
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    expected = [each.token_ids for each in llm.generate(prompts, params, "plain")]
    for batch in (prompts, prompts[:1], prompts[1:]):
        got = llm.generate(batch, params, method)
        assert [each.token_ids for each in got] == [expected[prompts.index(prompt)] for prompt in batch]
    assert llm.engine.cache.used_bytes == 0


def test_every_instruction_set_agrees_with_pytorch(make_checkpoint, tmp_path):
    """A row is the same bits beside others in each of them, and near what the panels stand for in PyTorch's float32."""
    folder = make_checkpoint("qwen3").folder
    text, known = list(range(2, 40)), torch.get_num_threads()
    torch.set_num_threads(2)
    expected, sets = {}, []
    try:
        for name in INSTRUCTION_SETS:
            with chosen(name, LIBRARY, tmp_path) as available:
                if not available:
                    continue
                sets.append(name)
                for precision, options in PRECISIONS.items():
                    native = load_model(folder, device="cpu", backend="native", **options)
                    cache = Cache(native.config.layers, native.cache_dtype, native.device)
                    logits = native.forward(Rows.of(cache.sequence(), text, 0))
                    single = cache.sequence()
                    for row, token in enumerate(text):
                        assert torch.equal(native.forward(Rows.of(single, [token], row))[0], logits[row])
                        single.commit(1)
                    if precision not in expected:
                        twin = dense_twin(native, load_model(folder, "float32", "cpu", "torch"))
                        sequence = Cache(twin.config.layers, twin.cache_dtype, twin.device).sequence()
                        expected[precision] = twin.forward(Rows.of(sequence, text, 0))
                    error = ((logits - expected[precision]).norm() / expected[precision].norm()).item()
                    assert error < {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.04, "int4": 0.04}[precision], name
    finally:
        torch.set_num_threads(known)
    assert "portable" in sets


@pytest.mark.parametrize("built", ["none", "fewer", "more", "others"])
def test_a_library_of_another_version_is_refused(built, make_checkpoint, monkeypatch):
    """Its structures have other sizes, or it does not even say which."""
    mine = [ctypes.sizeof(struct) for struct in STRUCTS]
    theirs = {"fewer": mine[:-1], "more": [*mine, 8], "others": [*mine[:-1], mine[-1] + 8]}.get(built, mine)
    sizes = (ctypes.c_int64 * (len(theirs) + 1))(*theirs)

    class Sizes:
        def __call__(self):
            return ctypes.cast(sizes, self.restype)

    class Built:
        def __init__(self, path):
            assert path == str(LIBRARY)
            if built != "none":
                self.hasten_sizes = Sizes()

    library.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", Built)
    try:
        for backend in ("auto", "native"):
            with pytest.raises(UserError, match="was built from another version of hasten: reinstall hasten"):
                load_model(make_checkpoint("llama").folder, device="cpu", backend=backend)
    finally:
        library.library.cache_clear()


def test_threads_borrowed_or_our_own_give_the_same(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint("llama", num_hidden_layers=1).folder

    def by_three_threads() -> list[torch.Tensor]:
        logits = []
        for dtype in ("float32", "bfloat16"):
            model = load_model(folder, dtype=dtype, device="cpu", backend="native")
            cache = Cache(model.config.layers, model.cache_dtype, model.device)
            torch.set_num_threads(3)
            try:
                for rows in (1, 60):
                    logits.append(model.forward(Rows.of(cache.sequence(), list(range(2, 2 + rows)), 0)))
                    # PyTorch's own kernels use the same registers of the same threads.
                    x = torch.randn(64, 256).bfloat16()
                    torch.testing.assert_close((x @ x.T).float(), x.float() @ x.float().T, atol=1.0, rtol=0.02)
            finally:
                torch.set_num_threads(1)
        return logits

    borrowed = by_three_threads()
    # A library borrows when it is loaded: this is another one, in the same instruction set.
    monkeypatch.setattr(library, "openmp_runtime", lambda: None)
    with chosen(str(library.kernels()), LIBRARY, tmp_path):
        own = by_three_threads()
    assert all(torch.equal(one, other) for one, other in zip(borrowed, own, strict=True))


def test_tokens_that_are_not_there_are_refused(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    with pytest.raises(IndexError):
        model.forward(Rows.of(cache.sequence(), [3, 4], 0), [2])
    for token in (97, -1):
        with pytest.raises(IndexError, match="vocabulary"):
            model.forward(Rows.of(cache.sequence(), [3, token], 0))


def test_refusals(make_checkpoint):
    checkpoint = make_checkpoint("llama")
    config = read_config(checkpoint.folder)
    cpu = torch.device("cpu")
    assert refusal(config, torch.float32, cpu) is None
    assert refusal(config, torch.bfloat16, cpu) is None
    assert "bfloat16 on CPU only" in str(refusal(config, torch.float16, cpu))
    uneven = read_config(make_checkpoint("llama", intermediate_size=77).folder)
    assert "multiple of 16 channels" in str(refusal(uneven, torch.float32, cpu))
    with pytest.raises(UserError, match="backend must be"):
        load_model(checkpoint.folder, backend="fast")
    with pytest.raises(UserError, match="weights must be"):
        load_model(checkpoint.folder, weights="int3")
    with pytest.raises(UserError, match="int8 weights need the native backend"):
        load_model(checkpoint.folder, backend="torch", weights="int8")
    with pytest.raises(UserError, match="native backend cannot run"):
        load_model(checkpoint.folder, backend="native", dtype="float16")
    assert load_model(checkpoint.folder, dtype="float16", device="cpu").backend.name == "torch"


def test_invariant_numerics_are_given_or_refused(make_checkpoint):
    folder = make_checkpoint("llama").folder
    assert load_model(folder, dtype="bfloat16", device="cpu", numerics="invariant").backend.name == "native"
    with pytest.raises(UserError, match="numerics must be"):
        load_model(folder, numerics="exact")
    with pytest.raises(UserError, match="invariant numerics need"):
        load_model(folder, device="cpu", backend="torch", numerics="invariant")
    with pytest.raises(UserError, match="native backend cannot run"):
        load_model(folder, device="cpu", dtype="float16", numerics="invariant")
    with pytest.raises(UserError, match="cuda backend cannot run"):
        load_model(folder, device="cpu", backend="cuda")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_a_row_that_overflows_is_not_finite_and_spoils_no_other(name, precision, make_checkpoint, tmp_path):
    folders = [make_checkpoint(architecture, intermediate_size=80).folder for architecture in ("llama", "qwen3")]
    with chosen(name, LIBRARY, tmp_path) as available:
        if not available:
            pytest.skip(f"{name} is not here")
        for folder in folders:
            model = load_model(folder, device="cpu", backend="native", **PRECISIONS[precision])
            cache = Cache(model.config.layers, model.cache_dtype, model.device)
            alone = model.forward(Rows.of(cache.sequence(), [3, 4], 0))
            for value in (1e20, 1e30, -1e38, torch.inf, torch.nan):
                model.embedding[5] = value
                spans = [Span(cache.sequence(), 0, 1), Span(cache.sequence(), 1, 3)]
                both = model.forward(Rows(torch.tensor([5, 3, 4]), torch.tensor([0, 0, 1]), spans))
                assert both[0].isnan().all(), value
                assert torch.equal(both[1:], alone)


def test_norms_of_heads_that_overflow(make_checkpoint):
    model = load_model(make_checkpoint("qwen3", intermediate_size=80).folder, "float32", "cpu", "native")
    model.layers[1].mixer_norm.weight.mul_(1e25)
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    assert model.forward(Rows.of(cache.sequence(), [3, 4], 0)).isnan().all()


def test_a_chain_ends_where_logits_are_not_finite(model):
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    sequence = behind(model, cache, 5)
    sound = chain(model, sequence, 3, 5, 97, 6, 0.0)
    assert len(sound) == 6
    later = sound[2][0]
    kept = model.embedding[later].clone()
    try:
        model.embedding[later] = 1e30
        with pytest.raises(UserError, match="the model's logits are not finite"):
            chain(model, sequence, 3, 5, 97, 6, 0.0)
    finally:
        model.embedding[later] = kept
    assert chain(model, sequence, 3, 5, 97, 6, 0.0) == sound
