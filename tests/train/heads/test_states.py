"""Hidden states on disk: those of a pass of each dialogue alone, whatever was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten import LLM
from hasten.errors import UserError
from hasten.model import Rows, Taps
from hasten.train.heads import states
from hasten.train.heads.dialogues import Dialogue
from hasten.train.heads.states import open_states, read_states

TAPS = (("final_norm", 0), ("input", 1))
DIALOGUES = [Dialogue(list(range(2, 2 + n)), list(range(30, 30 + m))) for n, m in ((3, 5), (9, 2), (1, 1), (20, 12))]


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "ROWS_OF_PASS", 20)


def alone(llm: LLM, dialogue: Dialogue) -> torch.Tensor:
    sequence = llm.engine.cache.sequence()
    taps = Taps(TAPS)
    llm.model.forward(Rows.of(sequence, dialogue.ids, 0), None, taps)
    sequence.release()
    return torch.stack([taps[tap] for tap in TAPS], 1)


def test_they_are_the_targets(llm: LLM, tmp_path: Path) -> None:
    read = read_states(llm, DIALOGUES, TAPS, tmp_path / "s.bin", 10**9)
    assert len(read) == 4 and read.bounds == [0, 8, 19, 21, 53]
    for number, dialogue in enumerate(DIALOGUES):
        rows = slice(read.bounds[number], read.bounds[number + 1])
        assert read.tokens[rows].tolist() == dialogue.ids
        assert read.answers[rows].tolist() == [False] * len(dialogue.prompt) + [True] * len(dialogue.answer)
        torch.testing.assert_close(read.states[rows].float(), alone(llm, dialogue), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("kept", [0, 700, 2000])
def test_interrupted_they_are_read_on(llm: LLM, tmp_path: Path, kept: int) -> None:
    file = tmp_path / "s.bin"
    read_states(llm, DIALOGUES, TAPS, file, 10**9)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    told: list[int] = []
    read_states(llm, DIALOGUES, TAPS, file, 10**9, told.append)
    assert file.read_bytes() == whole and sum(told) == 4


def test_more_dialogues_are_read_behind_those_that_were(llm: LLM, tmp_path: Path) -> None:
    read_states(llm, DIALOGUES, TAPS, tmp_path / "whole.bin", 10**9)
    read_states(llm, DIALOGUES[:2], TAPS, tmp_path / "grown.bin", 10**9)
    read = read_states(llm, DIALOGUES, TAPS, tmp_path / "grown.bin", 10**9)
    assert len(read) == 4
    for suffix in ("", ".json"):
        assert (tmp_path / f"grown.bin{suffix}").read_bytes() == (tmp_path / f"whole.bin{suffix}").read_bytes()


def test_a_bound_of_bytes(llm: LLM, tmp_path: Path) -> None:
    row = 2 * 2 * llm.model.config.hidden_size
    read = read_states(llm, DIALOGUES, TAPS, tmp_path / "s.bin", 20 * row)
    assert read.bounds == [0, 8, 19] and (tmp_path / "s.bin").stat().st_size == 19 * row
    with pytest.raises(UserError, match="too few"):
        read_states(llm, DIALOGUES, TAPS, tmp_path / "t.bin", 10 * row)


def test_of_something_else(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "s.bin"
    read_states(llm, DIALOGUES, TAPS, file, 10**9)
    with pytest.raises(UserError, match="of another taps"):
        read_states(llm, DIALOGUES, TAPS[:1], file, 10**9)
    with pytest.raises(UserError, match="of another dialogues"):
        read_states(llm, [*DIALOGUES[:3], Dialogue([2], [3])], TAPS, file, 10**9)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        open_states(file, DIALOGUES)
