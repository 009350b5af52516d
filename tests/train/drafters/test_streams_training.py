"""Training of streams: the main stream learns what it learns without, and streams save passes."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from small_drafters import recipe
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams
from hasten.cache import Cache
from hasten.engine.sampling.bans import Bans
from hasten.errors import Interrupted, UserError
from hasten.files import write_text
from hasten.methods.drafters.small_model import SmallCheckpoint
from hasten.methods.systems.rollouts import Opening, Rollouts
from hasten.methods.systems.streams import FILE, Streams
from hasten.model import Rows, load_model
from hasten.model.checkpoint import resolve
from hasten.train.drafters.align import AlignRecipe
from hasten.train.drafters.streams import StreamedNetwork, StreamedRecipe
from hasten.train.heads.dialogues import read_dialogues
from hasten.train.heads.recipe import DIALOGUES, Dialogues, HeadBatch
from hasten.train.heads.states import read_states
from hasten.train.trainer import train
from helpers import stopped_at


def begun(folder: Path, **settings: object) -> tuple[StreamedNetwork, HeadBatch]:
    """A network whose vectors are something, and a batch of some dialogues."""
    network, data = recipe(folder, StreamedRecipe, batch_tokens=400, **settings).begin(folder)
    assert isinstance(network, StreamedNetwork)
    with torch.no_grad():
        network.vectors.copy_(0.3 * torch.randn(network.vectors.shape, generator=torch.Generator().manual_seed(3)))
    return network, next(data.batches(data.held_out, 400))


def test_the_main_stream_does_not_notice(folder: Path) -> None:
    network, batch = begun(folder)
    rows, _ = network.rows(batch)
    (alone,), (main, _) = network.logits(batch, rows), network.streams(batch, [rows, rows])
    torch.testing.assert_close(main, alone, atol=1e-5, rtol=1e-5)


def test_a_stream_is_told_what_the_target_says_in_its_place(folder: Path) -> None:
    network, batch = begun(folder, streams=3)
    for distance, (rows, later) in enumerate(network.ahead(batch)):
        assert len(rows) and torch.equal(later, rows + distance)
        # From the last token of the prompt on; what is said is the same answer's.
        assert batch.answers[rows + 1].all() and batch.answers[later + 1].all()
        assert torch.equal(batch.dialogue[rows], batch.dialogue[later + 1])
        torch.testing.assert_close(network.teacher(batch, later), batch.states[rows + distance, 0] @ network.head.T)


def test_it_drafts_with_what_was_trained(folder: Path, tmp_path: Path) -> None:
    """The network's padded pass, all streams behind each other, against the engine's on one dialogue."""
    network, batch = begun(folder, layers=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16())
    number = int(batch.dialogue.max())
    own = batch.dialogue == number
    rows = torch.nonzero(own).flatten()
    with torch.inference_mode():
        expected = torch.stack(list(network.streams(batch, [rows] * 3)), 1)
    recipe(folder, StreamedRecipe).export(network, tmp_path)
    model = load_model(tmp_path, "float32")
    streams = Streams.load(tmp_path, model)
    assert streams is not None and streams.layer == 1 and len(streams) == 2
    ids = torch.where(network.number_of[batch.ids[own]] < 0, 400, network.number_of[batch.ids[own]]).tolist()
    sequence = Cache(model.config.layers, model.cache_dtype, model.device).sequence()
    said = streams.forward(model, Rows.of(sequence, ids, 0), range(len(ids)), range(len(ids)))
    got = torch.cat([said.logits[:, None], streams.logits(model, said.states)], 1)
    torch.testing.assert_close(got[..., :400], expected, atol=1e-4, rtol=1e-4)


def test_interrupted_and_resumed_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    short = recipe(folder, StreamedRecipe, tokens=4000)
    train(short, whole)
    with stopped_at(4, lambda: signal.raise_signal(signal.SIGINT), Interrupted):
        train(short, cut)
    train(short, cut)
    for name in ("model.safetensors", "config.json", FILE):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues that go round and round among a dozen tokens: what comes later is as plain as what comes next."""
    folder, order = tmp_path_factory.mktemp("rounds"), random.Random(0).sample(range(50, 200), 12)
    told = []
    for number in range(160):
        text = [order[(number + place) % 12] for place in range(30)]
        told.append({"prompt_token_ids": [300 + number, *text[:6]], "token_ids": text[6:]})
    write_text(folder / DIALOGUES, "".join(json.dumps(line) + "\n" for line in ({}, {"dialogues": told})))
    llm = LLM("tiny", dtype="float32")
    read_states(llm, read_dialogues(folder / DIALOGUES), (("final_norm", 0),), folder / AlignRecipe.states, 10**9)
    return folder


@pytest.fixture(scope="module")
def streamed(rounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that goes round, by cross-entropy on these."""
    made = tmp_path_factory.mktemp("streamed") / "draft"
    settings = {"distance": "ce", "opening": 0.0, "tokens": 40_000, "lr": 1e-2, "words": 0}
    train(recipe(rounds, StreamedRecipe, **settings), made)
    return made


def test_the_card_tells_what_each_stream_is_worth(rounds: Path, streamed: Path) -> None:
    told = json.loads((streamed / "config.json").read_text())["alignment"]
    network, data = recipe(rounds, StreamedRecipe, base=str(streamed), words=0).begin(rounds)
    assert isinstance(network, StreamedNetwork)
    streams = Streams.load(streamed, load_model(streamed, "float32"))
    assert streams is not None
    with torch.no_grad():
        network.vectors.copy_(streams.vectors)
    target = load_model(resolve("tiny"), "float32", backend="torch")
    measured = recipe(rounds, StreamedRecipe).measure(network, target, data)
    overlaps = [float(each.overlap.mean()) for each in measured]
    assert [*told["acceptance"], *told["streams"]["acceptance"]] == pytest.approx(overlaps, abs=1e-3)
    assert list(map(len, (told["agreement"], told["streams"]["agreement"]))) == [1, 2]


def passes(draft: Path, prompts: list[list[int]], streams: int) -> tuple[list[list[int]], int]:
    """Windows of seven tokens behind some prompts, and what passes they took."""
    target = resolve("tiny")
    made = Rollouts(SmallCheckpoint(draft, "float32", "cpu", "auto"), target, frozenset(), 7, 0.0, 1, streams)
    for number, prompt in enumerate(prompts):
        made.open(Opening(number, prompt, SamplingParams(), 0, 2048, Bans(set(), 0, set()), 50))
    asked = [made.windows([(number, [])]) for number in range(len(prompts))]
    return [window.tokens for (window,), _ in asked], sum(spent.passes for _, spent in asked)


def test_trained_streams_save_passes(rounds: Path, streamed: Path) -> None:
    """Windows are the same; with two streams that are right, three passes."""
    held = Dialogues(rounds, AlignRecipe.states)
    prompts = [held.batch([number]).ids[:12].tolist() for number in held.held_out]
    (alone, many), (beside, few) = (passes(streamed, prompts, streams) for streams in (0, 2))
    assert alone == beside and many == 7 * len(prompts) and few < 0.6 * many


def test_it_is_any_drafter_s_folder(streamed: Path) -> None:
    """Of other methods, and of transformers; and with streams, tokens are plain decoding's."""
    assert LlamaForCausalLM.from_pretrained(streamed).lm_head.weight.shape == (2048, 48)
    llm, asked = LLM("tiny", dtype="float32"), SamplingParams(max_tokens=40, temperature=0.5, seed=1)
    prompts = ["sort: 5 3 9 1", "12 + 30 ="]
    plain = [each.token_ids for each in llm.generate(prompts, asked, "plain")]
    for spec in ("draft-model", "mirror-sd:executor=inline,width=2,confidence=0,streams=2"):
        method = f"{spec},model={streamed}" if ":" in spec else f"{spec}:model={streamed}"
        assert [each.token_ids for each in llm.generate(prompts, asked, method)] == plain


@pytest.mark.parametrize("streams", [0, 9, -1])
def test_what_cannot_be(streams: int) -> None:
    with pytest.raises(UserError, match="streams must be between 1 and 8, or 0 for none"):
        recipe(Path(), StreamedRecipe, streams=streams)
