"""What a unit is, by hand; probabilities as transformers has them, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from hasten import LLM, UserError
from hasten.train.heads.dialogues import Dialogue
from hasten.train.lud.units import kept_confidences, read_confidences, units

DIALOGUES = [
    Dialogue(
        [number * 7 % 150 + 2 for number in range(count)], [(number * 5 + count) % 150 for number in range(answer)]
    )
    for count, answer in ((3, 9), (40, 1), (1, 30), (300, 240), (2, 2))
]


def test_units_written_by_hand():
    sure = [False, True, True, False, True, True, True, True, False]
    assert units(sure, 4) == [range(3), range(3, 7), range(7, 8), range(8, 9)]
    assert units(sure, 2) == [range(2), range(2, 3), range(3, 5), range(5, 7), range(7, 8), range(8, 9)]
    assert units(sure, 4, first=4) == [range(4, 8), range(8, 9)]
    assert units(sure, 4, first=9) == units([], 4) == []


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6), st.integers(0, 5))
def test_units_are_all_of_an_answer_and_as_long_as_they_may_be(sure: list[bool], most: int, first: int):
    found = units(sure, most, first)
    assert [place for unit in found for place in unit] == list(range(first, len(sure)))
    for unit in found:
        assert 1 <= len(unit) <= most and all(sure[place] for place in unit[1:])
        assert len(unit) == most or unit.stop == len(sure) or not sure[unit.stop]


def test_probabilities_are_the_models_own(llm: LLM, tiny: Path, tmp_path: Path):
    told: list[int] = []
    found = read_confidences(llm, DIALOGUES[:3], tmp_path / "c.jsonl", told.append)
    assert sum(told) == 3 and kept_confidences(tmp_path / "c.jsonl") == found
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for dialogue, values in zip(DIALOGUES, found, strict=False):
        with torch.inference_mode():
            likely = model(torch.tensor([dialogue.ids])).logits[0].softmax(-1)
        expected = [
            float(likely[len(dialogue.prompt) - 1 + number, token]) for number, token in enumerate(dialogue.answer)
        ]
        assert values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_interrupted_and_resumed_it_is_the_same_file(llm: LLM, tmp_path: Path, lines: int):
    some = [DIALOGUES[0]] * 50
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    read_confidences(llm, some, whole)
    content = whole.read_bytes().splitlines(keepends=True)
    assert len(content) > 2
    cut.write_bytes(b"".join(content[: lines + 1]) + b"".join(content[lines + 1 : lines + 2])[:10])
    assert read_confidences(llm, some, cut) == read_confidences(llm, some, whole)
    assert cut.read_bytes() == whole.read_bytes()


def test_a_file_of_other_dialogues(llm: LLM, tmp_path: Path):
    read_confidences(llm, DIALOGUES[:2], tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="with another dialogues"):
        read_confidences(llm, DIALOGUES[1:3], tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        kept_confidences(tmp_path / "none.jsonl")
