"""Fine-tuning under SkipDecode's schedules: what is trained is what is decoded, and the model remembers it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Engine, Target
from hasten.methods.skipping.skipdecode import SkipDecode, SkipDecodeParameters
from hasten.model import load_model
from hasten.train.data import IGNORE
from hasten.train.forward import logits
from hasten.train.skipdecode import ScheduledTuning, answer_starts, prefixes, scheduled_states
from hasten.train.trainer import Trainer, train
from helpers import interrupted_at

LAYERS = 7
PROMPTS = [[number * 13 % 90 + 2 for number in range(length)] for length in (11, 4)]
RUN = ScheduledTuning(shares=[0.6, 0.9], tokens=3_000, batch_tokens=512, context=128, length=24, precision="fp32")


def test_the_pass_that_is_trained_is_what_is_decoded(make_checkpoint):
    """Answers behind prompts of two lengths, each token as likely as when it was decoded step by step."""
    checkpoint = make_checkpoint("llama", num_hidden_layers=LAYERS)
    model = load_model(checkpoint.folder, "float32")
    parameters = SkipDecodeParameters(most=6, least=3, warm=2, length=12)
    engine, drafter = Engine(model), SkipDecode(Target(model), parameters)
    asked = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    requests = [engine.add(prompt, asked, drafter)[0] for prompt in PROMPTS]
    list(engine.run())
    width = max(len(request.tokens) for request in requests)
    ids = torch.tensor([request.tokens + [0] * (width - len(request.tokens)) for request in requests])
    starts = torch.tensor([len(prompt) for prompt in PROMPTS])
    with torch.inference_mode():
        states = scheduled_states(checkpoint.reference, ids, starts, drafter.schedule, 12, torch.float32)
        found = logits(checkpoint.reference, states).log_softmax(-1)
    for row, request in enumerate(requests):
        places = range(request.prompt_length - 1, len(request.tokens) - 1)
        likely = [float(found[row, place, request.tokens[place + 1]]) for place in places]
        assert likely == pytest.approx([each.logprob for each in request.logprobs], abs=1e-3)


def test_each_layer_computes_a_prefix():
    schedule = SkipDecodeParameters(most=6, least=3, warm=1).schedule(LAYERS)
    # Layers fall away from below: of 6 to 3 on 10 places, the lowest above the warm one first.
    counts = [schedule.count(index, 10) for index in range(16)]
    reach = prefixes(schedule, 16, 10)
    assert reach == [16, 0, *(sum(count > least for count in counts) for least in (5, 4, 3)), 16, 16]
    assert reach[1:] == sorted(reach[1:])


def test_where_answers_begin():
    labels = torch.full((3, 10), IGNORE)
    labels[0, 4:7] = 1
    labels[1, :8] = 1
    generator = torch.Generator().manual_seed(0)
    drawn = [answer_starts(labels[:2], generator).tolist() for _ in range(60)]
    assert {first for first, _ in drawn} == {4}
    assert {second for _, second in drawn} == set(range(1, 9))


def test_schedules_fall_to_their_own():
    run = replace(RUN, ramp=0.5)
    shares = [run.schedule(10, progress, 0) for progress in (0, 0.25, 0.5, 1)]
    assert [(each.most + each.least) / 2 for each in shares] == [10, 8, 6, 6]
    assert replace(RUN, ramp=0).schedule(10, 0, 1) == SkipDecodeParameters(share=0.9).schedule(10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scheduled") / "model"
    train(RUN, folder)
    return folder


def test_the_model_is_decoded_with_its_own_schedule(trained: Path):
    """The first share, unless a specification names another."""
    assert json.loads((trained / "config.json").read_text())["skipdecode"] == {"share": 0.6, "warm": 1, "length": 24}
    llm = LLM(trained, dtype="float32")
    for spec, share in (("skipdecode", 0.6), ("skipdecode:share=0.9", 0.9)):
        drafter = llm.engine.drafter(spec)[1]
        assert isinstance(drafter, SkipDecode)
        assert (drafter.parameters.share, drafter.parameters.length) == (share, 24)
    assert LLM("tiny").engine.drafter("skipdecode")[1].parameters == SkipDecodeParameters()


def test_an_interrupted_run_ends_in_the_same_weights(trained: Path, tmp_path: Path):
    with interrupted_at(3):
        train(RUN, tmp_path)
    train(RUN, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_training_with_fewer_layers_lowers_the_loss_with_fewer_layers(tmp_path: Path):
    """On the same batches, of a model that was never asked to skip."""
    run = replace(RUN, shares=[0.6], ramp=0.0, tokens=8_000, lr=3e-3)
    run.prepare(tmp_path)
    trainer = Trainer(run, tmp_path)

    def loss() -> float:
        with torch.no_grad():
            batches = trainer.recipe.pool(trainer.stream, 99, 0.0)[:4]
            return sum(float(run.loss(trainer.model, each, 1.0, torch.Generator())) for each in batches) / 4

    before = loss()
    for batch in trainer.batches():
        if trainer.tokens >= run.tokens:
            break
        trainer.step(batch)
    assert loss() < 0.8 * before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shares": []}, "at least one"),
        ({"shares": [0.5, 1.5]}, "share must be above 0"),
        ({"length": 0}, "length must be at least 1"),
        ({"ramp": 2.0}, "ramp between 0 and 1"),
        ({"warm": 0}, "warm must be at least 1"),
    ],
)
def test_what_it_refuses(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(RUN, **settings)


def test_models_that_have_no_such_schedule(tmp_path: Path):
    for parent, message in (("tiny-block", "fills masked positions"), ("tiny-diffusion", "fills masked positions")):
        with pytest.raises(UserError, match=message):
            replace(RUN, parent=parent).build(None)
    with pytest.raises(UserError, match="cannot be run"):
        replace(RUN, warm=5).build(None)
