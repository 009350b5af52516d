"""A drafter's streams: rows that say what comes after the next token, which nothing of the drafter notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hasten import LLM, SamplingParams, UserError
from hasten.cache import Cache
from hasten.engine import Engine
from hasten.engine.sampling.bans import Bans
from hasten.methods.drafters.small_model import SmallCheckpoint
from hasten.methods.systems import rollouts as module
from hasten.methods.systems.rollouts import Opening, Rollouts
from hasten.methods.systems.streams import FILE, Streams
from hasten.model import Decoder, Rows, Span, load_model
from hasten.model.native.library import LIBRARY
from helpers import VOCABULARY, make_model, make_tokenizer

TEXT = [5, 9, 60, 31]
PROMPT = [number * 13 % 140 + 2 for number in range(1, 24)]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not LIBRARY.exists(), reason="it was not built"))
KINDS = {
    "greedy": SamplingParams(seed=4),
    "sampled": SamplingParams(temperature=0.9, seed=4),
    "penalties": SamplingParams(temperature=0.9, seed=4, repetition_penalty=1.3, frequency_penalty=0.5),
    "bans": SamplingParams(seed=4, bad_words=((40,), (17, 5)), min_tokens=9),
}


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    """A model that mostly says its last token again, so that streams that say what it says are mostly right."""
    folder, model = tmp_path_factory.mktemp("steady") / "tiny", make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.1)
        model.lm_head.weight.copy_(0.2 * model.model.embed_tokens.weight)
    for name in ("tiny", "tiny-draft"):
        model.save_pretrained(folder.with_name(name))
        make_tokenizer().save_pretrained(folder.with_name(name))
    Streams(torch.zeros(2, 48), 1).save(folder.with_name("tiny-draft"))
    return folder


def rollouts(target: Path, streams: int, length: int = 7, confidence: float = 0.0) -> Rollouts:
    checkpoint = SmallCheckpoint(Path(f"{target}-draft"), "float32", "cpu", "auto")
    return Rollouts(checkpoint, target, frozenset({1}), length, confidence, 3, streams)


def opening(params: SamplingParams, number: int = 0, tokens: list[int] = PROMPT) -> Opening:
    words = {word for word in params.bad_words if not isinstance(word, str)}
    return Opening(number, list(tokens), params, 0, VOCABULARY, Bans({1}, params.min_tokens, words), 50)


def read(model: Decoder) -> Cache:
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    model.forward(Rows.of(sequence, TEXT, 0))
    sequence.commit(len(TEXT))
    return sequence


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("layer", [0, 1])
def test_streams_are_what_the_pieces_make_of_their_token(tiny: Path, layer: int, backend: str) -> None:
    """Behind two rows of a tree, of two sequences: each place by itself, all rows in all layers."""
    model = load_model(Path(f"{tiny}-draft"), "float32", backend=backend)
    streams = Streams(torch.randn(3, 48, generator=torch.Generator().manual_seed(1)), layer)
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    tokens, positions = torch.tensor([7, 8, 11, 7, 8]), torch.tensor([4, 5, 5, 4, 5])
    rows = Rows(tokens, positions, [Span(read(model), 0, 3, sees), Span(read(model), 3, 5)])
    said = streams.forward(model, rows, [0, 1, 2, 4], [1, 2, 4])
    assert [span.sequence.pending for span in rows.spans] == [3, 2]
    plain = load_model(Path(f"{tiny}-draft"), "float32", backend="torch")
    for place, token in enumerate([8, 11, 8]):
        own = torch.ones(5, 5).bool().tril()
        alone = Rows(torch.tensor([7, token, 0, 0, 0]), torch.arange(4, 9), [Span(read(plain), 0, 5, own)])
        step, x = plain.start(alone), plain.embed(alone)
        for each in plain.layers:
            if each.index == layer:
                x = torch.cat([x[:2], x[1] + streams.vectors])
            x = each.forward(x, step)
        torch.testing.assert_close(said.logits[place + 1], plain.logits(x, [1])[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said.states[place], plain.norm.forward(x)[2:], atol=1e-4, rtol=1e-4)
        logits = streams.logits(model, said.states[place : place + 1])
        torch.testing.assert_close(logits[0], plain.logits(x, [2, 3, 4]), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not LIBRARY.exists(), reason="it was not built")
def test_the_main_stream_does_not_notice(tiny: Path) -> None:
    """To the bit, in passes that extend what is pending, too."""
    model, said = load_model(Path(f"{tiny}-draft"), "float32", backend="native"), []
    streams = Streams.load(Path(f"{tiny}-draft"), model)
    assert streams is not None and len(streams) == 2
    for own in (None, streams):
        sequence = read(model)
        for extend, drafted, mask in (
            (False, [7, 8], None),
            (True, [9, 3], torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1]]).bool()),
            (True, [4], None),
        ):
            tokens, count = torch.tensor(drafted), len(drafted)
            rows = Rows(tokens, torch.arange(4, 4 + count), [Span(sequence, 0, count, mask, extend)])
            wanted = list(range(count))
            said.append(model.forward(rows, wanted) if own is None else own.forward(model, rows, wanted, wanted).logits)
        sequence.commit([0, 1, 2])
        said.append(model.forward(Rows.of(sequence, [6], 7)))
    for alone, beside in zip(said[:4], said[4:], strict=True):
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("rounds", [0, 1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("right", [False, True], ids=["wrong", "right"])
def test_windows_are_those_of_the_main_stream(tiny, steady, kind, rounds, right, monkeypatch):
    """With streams that know nothing, and with some that are mostly right; of several requests, in any order, with
    candidates, misses, and chains that are not finished; with streams in all passes, whatever rows they have."""
    monkeypatch.setattr(module, "STREAM_ROWS", 10_000)
    seen, estimates = [], []
    for streams in (0, 1, 2):
        made, windows, came = rollouts(steady if right else tiny, streams), [], {0: [], 1: [], 2: []}
        for number in came:
            made.open(opening(KINDS[kind], number, PROMPT[number * 7 :]))
        for accepted in (3, 0, 7, 2):
            asked, _ = made.windows(list(came.items()))
            windows += asked
            made.branch([(number, [[9, 50, 60]] * (len(window.tokens) + 1)) for number, window in enumerate(asked)])
            for _ in range(rounds):
                made.round()
            # The last request always misses.
            came = {n: [*window.tokens[:accepted], (50, 9, 70)[n]] for n, window in enumerate(asked)}
        seen.append([(window.tokens, window.source) for window in windows])
        estimates.append([estimate for window in windows for estimate in window.estimates])
    assert seen[0] == seen[1] == seen[2]
    # With noise, what is drawn before a verdict is judged by what was known of the target then.
    if KINDS[kind].greedy or rounds in (0, 9):
        assert all(each == pytest.approx(estimates[0], rel=1e-4) for each in estimates)
    assert {source for _, source in seen[0]} == {"cold", "hit", "miss"}


def test_streams_that_are_right_save_passes(steady: Path) -> None:
    """Two of them: three tokens of a window of seven in each pass, where chains are few. None: seven passes."""
    for streams, confidence, passes in ((2, 0.0, 3), (1, 0.0, 4), (0, 0.0, 7), (2, 0.999, 1)):
        made = rollouts(steady, streams, confidence=confidence)
        made.open(opening(KINDS["greedy"], tokens=[70] * 5))
        (window,), spent = made.windows([(0, [])])
        assert window.tokens == [70] * (7 if not confidence else 1) and spent.passes == passes
        made.branch([(0, [[9]] * 2)])
        assert sum(made.round() for _ in range(9)) == passes


def test_many_chains_leave_no_room_for_streams(steady: Path) -> None:
    """Each pass says one more token of 24 chains."""
    made = rollouts(steady, 2)
    made.open(opening(KINDS["greedy"], tokens=[70] * 5))
    made.windows([(0, [])])
    made.branch([(0, [[9, 50, 60]] * 8)])
    assert sum(made.round() for _ in range(9)) == 7


def test_the_drafter_s_own_are_used_unless_told_otherwise(steady: Path) -> None:
    passes, llm = [], LLM(steady, dtype="float32")
    for spec in ("mirror-sd:executor=inline,confidence=0", "mirror-sd:executor=inline,confidence=0,streams=0"):
        engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(steady))
        engine.add(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True), spec)
        list(engine.run())
        clock = engine.drafter(spec)[1].clock
        passes.append(clock.passes / clock.windows)
    assert passes[0] < 0.6 * passes[1]
    with pytest.raises(UserError, match="streams must be between 0 and 8"):
        llm.engine.drafter("mirror-sd:streams=9")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"vectors": torch.zeros(2, 48)}, "has no layer"),
        ({"layer": torch.tensor(1)}, "has no vectors"),
        ({"vectors": torch.zeros(2, 48), "layer": torch.tensor(1), "more": torch.zeros(1)}, "has more, which"),
        ({"vectors": torch.zeros(2, 47), "layer": torch.tensor(1)}, r"vectors is \[2, 47\], and must be \[2, 48\]"),
        ({"vectors": torch.zeros(48), "layer": torch.tensor(1)}, r"vectors is \[48\]"),
        ({"vectors": torch.zeros(2, 48), "layer": torch.zeros(1)}, r"layer is \[1\]"),
        ({"vectors": torch.zeros(9, 48), "layer": torch.tensor(1)}, "must have 1 to 8 streams, not 9"),
        ({"vectors": torch.zeros(2, 48), "layer": torch.tensor(2)}, "layer must be one of the drafter's, 0 to 1"),
        ({"vectors": torch.full((2, 48), torch.nan), "layer": torch.tensor(1)}, "vectors holds NaN"),
        (None, "damaged"),
    ],
)
def test_what_it_refuses(tiny: Path, tmp_path: Path, tensors: dict[str, torch.Tensor] | None, message: str) -> None:
    if tensors is None:
        (tmp_path / FILE).write_bytes(b"nothing")
    else:
        save_file(tensors, tmp_path / FILE)
    model = load_model(Path(f"{tiny}-draft"), "float32")
    with pytest.raises(UserError, match=message):
        Streams.load(tmp_path, model)
    assert Streams.load(tmp_path / "elsewhere", model) is None
