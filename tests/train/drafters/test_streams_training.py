"""Training of streams: the main stream learns what it learns without, and streams save passes."""

from __future__ import annotations

import json
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
from hasten.methods.drafters.small_model import SmallCheckpoint
from hasten.methods.systems.rollouts import Opening, Rollouts
from hasten.methods.systems.streams import FILE, Streams
from hasten.model import Rows, load_model
from hasten.model.checkpoint import resolve
from hasten.train.drafters.align import AlignRecipe
from hasten.train.drafters.streams import StreamedNetwork, StreamedRecipe
from hasten.train.heads.recipe import Dialogues, HeadBatch
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
def streamed(folder: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained drafter, with streams."""
    made = tmp_path_factory.mktemp("streamed") / "draft"
    settings = {"base": str(pretrained), "distance": "kl", "tokens": 60_000, "lr": 1e-2, "streams": 2}
    train(recipe(folder, StreamedRecipe, **settings), made)
    return made


def test_the_card_tells_what_each_stream_is_worth(folder: Path, streamed: Path) -> None:
    told = json.loads((streamed / "config.json").read_text())["alignment"]
    (main,), (first, second) = told["agreement"], told["streams"]["agreement"]
    assert main > first > second > 0.05 and len(told["streams"]["acceptance"]) == 2
    # Without training, a stream says what its token does: not what comes later.
    network, data = recipe(folder, StreamedRecipe, base=str(streamed), streams=2).begin(folder)
    target = load_model(resolve("tiny"), "float32", backend="torch")
    unlearned = recipe(folder, StreamedRecipe).measure(network, target, data)
    assert float(unlearned[0].agrees.float().mean()) == pytest.approx(main, abs=0.01)
    assert first > 1.5 * float(unlearned[1].agrees.float().mean())


def passes(draft: Path, prompts: list[list[int]], streams: int) -> tuple[list[list[int]], int]:
    """Windows of seven tokens behind some prompts, and what passes they took."""
    target = resolve("tiny")
    made = Rollouts(SmallCheckpoint(draft, "float32", "cpu", "auto"), target, frozenset(), 7, 0.0, 1, streams)
    for number, prompt in enumerate(prompts):
        made.open(Opening(number, prompt, SamplingParams(), 0, 2048, Bans(set(), 0, set()), 50))
    asked = [made.windows([(number, [])]) for number in range(len(prompts))]
    return [window.tokens for (window,), _ in asked], sum(spent.passes for _, spent in asked)


def test_trained_streams_save_passes(folder: Path, streamed: Path) -> None:
    held = Dialogues(folder, AlignRecipe.states)
    batches = [held.batch([number]) for number in held.held_out]
    prompts = [batch.ids[: len(batch.ids) - 12].tolist() for batch in batches]
    (alone, many), (beside, few) = (passes(streamed, prompts, streams) for streams in (0, 2))
    assert alone == beside and many == 7 * len(prompts) and few < 0.85 * many


def test_it_is_any_drafter_s_folder(streamed: Path) -> None:
    """Of other methods, and of transformers; and with streams, tokens are plain decoding's."""
    assert LlamaForCausalLM.from_pretrained(streamed).lm_head.weight.shape == (401, 48)
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
