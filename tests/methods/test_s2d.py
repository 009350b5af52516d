"""S2D: exits are the truncated model, what stopped early is caught up with, and drafts are as sure as they say."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Target
from hasten.engine.creation import create
from hasten.methods.drafters.s2d import S2D
from hasten.methods.drafters.segments import Lot, SegmentedSequence, read
from helpers import make_model, make_tokenizer, same

TOKENS = [5, 17, 40, 5, 17, 40, 9, 120, 33, 2]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter of six layers."""
    folder = tmp_path_factory.mktemp("deep") / "drafter"
    make_model(0.05, num_hidden_layers=6).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def drafter(llm: LLM, spec: str) -> S2D:
    made = create(spec, Target(llm.model, llm.tokenizer, str(llm.folder)))
    assert isinstance(made, S2D)
    return made


def truncated(folder: Path, layers: int, tokens: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of transformers' model without the layers behind the first so many."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:layers]
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def read_one(own: S2D, sequence: SegmentedSequence, token: int, position: int) -> Tensor:
    places = torch.tensor([position])
    states = own.model.embedding[torch.tensor([token])]
    return own._until_sure([sequence], [Lot(states, places)])[0]


def test_each_exit_is_the_truncated_model_and_late_layers_catch_up(llm: LLM, deep: Path) -> None:
    """Four tokens committed, then six that leave here and there: every row's logits are those of a fresh pass."""
    own = drafter(llm, f"s2d:model={deep},exits=2/4/6,dtype=float32")
    sequence = own.cache.sequence()
    assert isinstance(sequence, SegmentedSequence)
    committed = 4
    states = own.model.embedding[torch.tensor(TOKENS[:committed])]
    lots = [Lot(states, torch.arange(committed))]
    for number in range(3):
        _, lots = read(own.segments, number, [sequence], lots, False, ())
    sequence.commit(committed)
    expected = {depth: truncated(deep, depth, TOKENS) for depth in own.exits}
    exits = [0, 1, 0, 2, 0, 2]
    for position, leaves in zip(range(committed, len(TOKENS)), exits, strict=True):
        own.thresholds = [-1.0 if leaves == 0 else 2.0, -1.0 if leaves == 1 else 2.0]
        logits = read_one(own, sequence, TOKENS[position], position)
        torch.testing.assert_close(logits, expected[own.exits[leaves]][position], atol=1e-5, rtol=1e-5)
        read_rows = [sequence.part(number).pending for number in range(3)]
        owed = [0 if lot is None else len(lot) for lot in sequence.waiting]
        # What a segment has not read is what waits for it.
        assert [read_rows[0] - read_rows[1], read_rows[1] - read_rows[2]] == owed
    assert own.left == [3, 1, 2] and sequence.length == committed


def test_greedy_and_sampled_tokens_are_plain_decodings(llm: LLM, deep: Path) -> None:
    prompts = [TOKENS, [7, 7, 8], [100, 3, 4, 90, 60]]
    for settings in ({}, {"temperature": 0.8}):
        asked = [SamplingParams(max_tokens=24, seed=number, **settings) for number in range(3)]
        plain = llm.generate(prompts, asked, "plain")
        ours = llm.generate(prompts, asked, f"s2d:model={deep},threshold=0.5,confidence=0,length=5")
        for mine, theirs in zip(ours, plain, strict=True):
            same(mine.choices[0], theirs.choices[0])


@pytest.mark.parametrize(("threshold", "left"), [(1e-9, 0), (1.0, 2)])
def test_the_threshold_says_where_tokens_leave(llm: LLM, deep: Path, threshold: float, left: int) -> None:
    spec = f"s2d:model={deep},threshold={threshold},confidence=0,length=4"
    own = llm.engine.drafter(spec)[1]
    assert isinstance(own, S2D)
    llm.generate([TOKENS], SamplingParams(max_tokens=20), spec)
    assert own.left[left] == sum(own.left) > 5
    assert own.cache.used_bytes == 0


def test_the_whole_drafter_drafts_as_draft_model(llm: LLM, deep: Path) -> None:
    asked = SamplingParams(max_tokens=24)
    ours, theirs = (
        llm.generate([TOKENS], asked, f"{spec},confidence=0.2")[0].choices[0].statistics
        for spec in (f"s2d:model={deep},threshold=1", f"draft-model:model={deep}")
    )
    assert (ours.accepted_per_step, ours.proposed) == (theirs.accepted_per_step, theirs.proposed)


def test_a_drafter_says_its_exits(llm: LLM, deep: Path, tmp_path: Path) -> None:
    folder = copytree(deep, tmp_path / "told")

    def tell(**said: object) -> None:
        config = json.loads((deep / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **said}))

    assert drafter(llm, f"s2d:model={folder}").exits == (2, 4, 6)
    tell(exits=[1, 6], thresholds=[0.7])
    own = drafter(llm, f"s2d:model={folder}")
    assert own.exits == (1, 6) and own.thresholds == [0.7]
    assert drafter(llm, f"s2d:model={folder},threshold=0.2").thresholds == [0.2]
    for said, message in (
        ({"exits": [1, 5]}, "the last exit must be 6"),
        ({"exits": [6, 1]}, "exits must be ascending"),
        ({"exits": "all"}, "exits must be ascending"),
        ({"exits": [1, 6], "thresholds": [2]}, "thresholds must be 1 numbers"),
        ({"exits": [1, 6], "thresholds": [0.1, 0.2]}, "thresholds must be 1 numbers"),
    ):
        tell(**said)
        with pytest.raises(UserError, match=message):
            drafter(llm, f"s2d:model={folder}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exits=2", "exits must be ascending"),
        ("exits=2/1", "exits must be ascending"),
        ("exits=x/2", "exits must be ascending"),
        ("threshold=1.5", "threshold must be between"),
        ("width=2", "width must be 1"),
    ],
)
def test_bad_parameters(llm: LLM, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        drafter(llm, f"s2d:{spec}")
