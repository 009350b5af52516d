"""FFN-SkipLLM: where a model's cold regions are, the threshold for a share, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Engine, Target
from hasten.methods.skipping import cold_regions
from hasten.methods.skipping.cold_regions import ANSWER, OPENING, Page, Regions, calibrate, regions
from hasten.methods.skipping.ffn_skipllm import FfnSkipLlm, FfnSkipLlmParameters
from hasten.model import OracleModel
from helpers import VOCABULARY, make_model

LAYERS = 8
TEXTS = [[(number * step) % (VOCABULARY - 2) + 2 for number in range(OPENING + 40)] for step in (7, 11, 29)]
PAGES = [Page(text, OPENING) for text in TEXTS]


@pytest.fixture(scope="module")
def load(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLM]:
    """A model some of whose feed-forward layers add little to the residual stream."""

    def make(faint: list[int]) -> LLM:
        folder = tmp_path_factory.mktemp("faint") / "model"
        shutil.copytree(tiny, folder)
        model = make_model(num_hidden_layers=LAYERS)
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                layer.mlp.down_proj.weight.mul_(0.3 if number in faint else 6.0)
        model.save_pretrained(folder)
        return LLM(folder, dtype="float32")

    return make


@pytest.fixture(scope="module")
def llm(load: Callable[..., LLM]) -> LLM:
    return load([2, 3, 4, 5])


def target_of(llm: LLM) -> Target:
    return Target(llm.model, llm.tokenizer, str(llm.folder))


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_the_region_is_found_and_the_share_is_met(llm: LLM, share: float):
    found = calibrate(llm.model, PAGES, share, run=2, outliers=0)
    assert (found.first, found.last) == (2, 5)
    assert found.share == pytest.approx(share, abs=0.02)
    assert all((cosine >= 0.9) == (2 <= layer <= 5) for layer, cosine in enumerate(found.cosines))


def test_outliers_are_the_largest_channels(load: Callable[..., LLM]):
    llm = load([2, 3, 4, 5])
    llm.model.embedding[:, [7, 30]] = 40.0
    found = calibrate(llm.model, PAGES, 0.1, run=2, outliers=2)
    assert set(found.outliers) == {7, 30}
    gate = found.gate(2, 48)
    assert gate.channels.sum() == 46 and not gate.channels[[7, 30]].any()


def test_the_longest_run_of_warm_layers_is_the_region():
    assert cold_regions._warm([0.99, 0.95, 0.5, 0.9, 0.96, 0.97, 0.3]) == (3, 5)
    assert cold_regions._warm([0.99] * 6) == (1, 4)
    for curve in ([0.99, 0.99, 0.8, 0.99, 0.99], [0.9, 0.9, 0.9], [0.5] * 9):
        with pytest.raises(UserError, match="nothing to skip: no 2 of its feed-forward layers in a row"):
            cold_regions._warm(curve)


def test_what_cannot_be_is_refused(llm: LLM):
    with pytest.raises(UserError, match=r"at most, 4 of 8 being warm, so ratio=0\.6 is too much"):
        calibrate(llm.model, PAGES, 0.6, run=2, outliers=0)
    with pytest.raises(UserError, match="needs a tokenizer"):
        FfnSkipLlm(Target(llm.model), FfnSkipLlmParameters(ratio=0.15))
    with pytest.raises(UserError, match="needs a transformer"):
        FfnSkipLlm(Target(OracleModel(lambda tokens: torch.zeros(8), 8)), FfnSkipLlmParameters())


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"ratio": 0.0}, "ratio must be between 0 and 1"),
        ({"ratio": 1.0}, "ratio must be between 0 and 1"),
        ({"run": 0}, "run must be at least 1"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"outliers": 65}, "outliers must be between 0 and 64"),
        ({"threshold": -0.1}, "threshold must not be negative"),
    ],
)
def test_refused_parameters(parameters: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        FfnSkipLlmParameters(**parameters)


def test_a_calibration_is_kept(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once per model and what is asked; a record that is damaged, or of another model, is made again."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    known = Regions(2, 5, 0.95, (1,), 0.2, (0.9,) * LAYERS)
    made: list[Any] = []
    monkeypatch.setattr(cold_regions, "calibrate", lambda *asked: made.append(asked[2:]) or known)
    target = target_of(llm)
    for asked in ((0.2, 2, 1), (0.2, 2, 1), (0.25, 2, 1), (0.25, 3, 1)):
        assert regions(target, llm.model, *asked) == known
    assert made == [(0.2, 2, 1), (0.25, 2, 1), (0.25, 3, 1)]
    for file in (tmp_path / "ffn-skipllm").iterdir():
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"last": LAYERS}))
    assert regions(target, llm.model, 0.2, 2, 1) == known
    assert len(made) == 4


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "ffn-skipllm").write_text("in the way")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(cold_regions, "calibrate", lambda *asked: Regions(2, 5, 0.95, (), 0.2, ()))
    assert regions(target_of(llm), llm.model, 0.2, 2, 0).first == 2


def test_answers_pass_by_as_many_layers_as_was_calibrated(llm: LLM):
    """To the same prompts, where what is skipped changes what is said."""
    engine, target = Engine(llm.model, llm.tokenizer, folder=str(llm.folder)), target_of(llm)
    drafter = FfnSkipLlm(target, FfnSkipLlmParameters(ratio=0.2, warmup=0))
    pages = cold_regions._pages(target, llm.model)
    assert len(pages) > 10 and all(0 < len(page.tokens) - page.prompt <= ANSWER for page in pages)
    for page in pages:
        engine.add(page.tokens[: page.prompt], SamplingParams(max_tokens=ANSWER, ignore_eos=True), drafter)
    list(engine.run())
    assert drafter.passed / (drafter.rows * LAYERS) == pytest.approx(0.2, abs=0.03)


def test_figures_add_up(llm: LLM):
    """Warm-up and cold regions go through all layers; what else is passed by is about what was asked for."""
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    drafter = FfnSkipLlm(target_of(llm), FfnSkipLlmParameters(ratio=0.25, warmup=6))
    asked = SamplingParams(max_tokens=46, temperature=1.0, seed=1, ignore_eos=True)
    for text in TEXTS:
        engine.add(text[:9], asked, drafter)
    for step in range(60):
        if step == 6:
            assert drafter.passed == 0
        engine.step()
    assert not engine.busy
    assert drafter.rows == 3 * 45
    assert 0.1 < drafter.passed / (3 * 39 * LAYERS) < 0.4
