"""Hidden states on disk: those of a pass of each dialogue alone, whatever was interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hasten import LLM
from hasten.errors import UserError
from hasten.model import Rows, Taps
from hasten.train.heads import states
from hasten.train.heads.dialogues import Dialogue
from hasten.train.heads.states import Tap, open_states, read_states

TAPS: tuple[Tap, ...] = (("final_norm", 0), ("input", 1))
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


def made(llm: LLM, taps: Sequence[Tap], folder: Path) -> Path:
    """A file of all dialogues, in a folder of its own."""
    folder.mkdir()
    read_states(llm, DIALOGUES, taps, folder / "s.bin", 10**9)
    return folder / "s.bin"


def test_they_are_the_targets(llm: LLM, tmp_path: Path) -> None:
    read = read_states(llm, DIALOGUES, TAPS, tmp_path / "s.bin", 10**9)
    assert len(read) == 4 and read.bounds == [0, 8, 19, 21, 53]
    for number, dialogue in enumerate(DIALOGUES):
        rows = slice(read.bounds[number], read.bounds[number + 1])
        assert read.tokens[rows].tolist() == dialogue.ids
        assert read.answers[rows].tolist() == [False] * len(dialogue.prompt) + [True] * len(dialogue.answer)
        torch.testing.assert_close(read[rows].float(), alone(llm, dialogue), atol=1e-4, rtol=2**-8)


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
    grown = tmp_path / "s.bin"
    read_states(llm, DIALOGUES[:2], TAPS, grown, 10**9)
    read = read_states(llm, DIALOGUES, TAPS, grown, 10**9)
    assert len(read) == 4
    whole = made(llm, TAPS, tmp_path / "whole")
    for suffix in ("", ".json"):
        assert (tmp_path / f"s.bin{suffix}").read_bytes() == whole.with_name(f"s.bin{suffix}").read_bytes()


def test_what_is_there_stays_where_less_is_asked_for(llm: LLM, tmp_path: Path) -> None:
    file, row = tmp_path / "s.bin", 2 * 2 * llm.model.config.hidden_size
    read_states(llm, DIALOGUES, TAPS, file, 10**9)
    whole = file.read_bytes(), file.with_name("s.bin.json").read_bytes()
    assert read_states(llm, DIALOGUES, TAPS, file, 20 * row).bounds == [0, 8, 19, 21, 53]
    assert (file.read_bytes(), file.with_name("s.bin.json").read_bytes()) == whole
    # An interrupted one goes on no further than is asked for now.
    file.write_bytes(whole[0][: 9 * row])
    assert read_states(llm, DIALOGUES, TAPS, file, 20 * row).bounds == [0, 8, 19]
    assert file.read_bytes() == whole[0][: 19 * row]


def test_what_dialogues_say_is_read_once(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files there are to compare with, each of other dialogues."""
    for count, name in ((2, "s.bin"), (3, "other.bin"), (4, "wide.bin")):
        read_states(llm, DIALOGUES[:count], TAPS, tmp_path / name, 10**9)
    (tmp_path / "s.bin").write_bytes(b"")
    read, digests = list[int](), states.digests

    def watched(dialogues: Sequence[Dialogue]) -> list[str]:
        read.append(len(dialogues))
        return digests(dialogues)

    monkeypatch.setattr(states, "digests", watched)
    read_states(llm, DIALOGUES, TAPS, tmp_path / "s.bin", 10**9)
    assert read == [4] and not (tmp_path / "s.bin").exists()


def test_a_bound_of_bytes(llm: LLM, tmp_path: Path) -> None:
    row = 2 * 2 * llm.model.config.hidden_size
    read = read_states(llm, DIALOGUES, TAPS, tmp_path / "s.bin", 20 * row)
    assert read.bounds == [0, 8, 19] and (tmp_path / "s.bin").stat().st_size == 19 * row
    with pytest.raises(UserError, match="too few"):
        read_states(llm, DIALOGUES, TAPS, tmp_path / "t.bin", 10 * row)


def test_a_file_of_more_taps_serves(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that neither begin nor follow each other, in the order that is asked for; of fewer dialogues as well."""
    file = tmp_path / "s.bin"
    wide: list[Tap] = [("final_norm", 0), ("input", 1), ("input", 2), ("input", 0)]
    wanted = [wide[3], wide[1]]
    own = open_states(made(llm, wanted, tmp_path / "own"), DIALOGUES)
    read_states(llm, DIALOGUES, wide, tmp_path / "wide.bin", 10**9)
    monkeypatch.setattr(states, "_pass", None)
    told: list[int] = []
    for most, rows in ((10**9, 53), (20 * 2 * 2 * llm.model.config.hidden_size, 19)):
        read = read_states(llm, DIALOGUES, wanted, file, most, told.append)
        assert not file.exists() and read.bounds[-1] == len(read.tokens) == rows
        for each in (read, open_states(file, DIALOGUES)):
            assert torch.equal(each[slice(0, rows)], own[slice(0, rows)])
    assert told == [4, 2]


def test_a_file_that_is_cut_off_serves_what_it_has(llm: LLM, tmp_path: Path) -> None:
    read_states(llm, DIALOGUES, TAPS, tmp_path / "wide.bin", 10**9)
    whole = (tmp_path / "wide.bin").read_bytes()
    (tmp_path / "wide.bin").write_bytes(whole[:-1])
    row = 2 * llm.model.config.hidden_size
    read_states(llm, DIALOGUES, TAPS[:1], tmp_path / "whole.bin", 10**9)
    assert (tmp_path / "whole.bin").stat().st_size == 53 * row
    read = read_states(llm, DIALOGUES, TAPS[:1], tmp_path / "first.bin", 30 * row)
    assert len(read) == 3 and not (tmp_path / "first.bin").exists()


def test_an_interrupted_file_gives_way_to_one_that_serves(llm: LLM, tmp_path: Path) -> None:
    """And is read by itself where that one is gone."""
    file, wide = tmp_path / "s.bin", tmp_path / "wide.bin"
    read_states(llm, DIALOGUES, TAPS[1:], file, 10**9)
    whole = file.read_bytes()
    file.write_bytes(whole[:700])
    read_states(llm, DIALOGUES, TAPS, wide, 10**9)
    served = read_states(llm, DIALOGUES, TAPS[1:], file, 10**9)
    assert not file.exists()
    assert served[slice(0, 53)].contiguous().view(torch.int16).numpy().tobytes() == whole
    wide.unlink()
    with pytest.raises(UserError, match=r"wide\.bin cannot be read"):
        open_states(file, DIALOGUES)
    read_states(llm, DIALOGUES, TAPS[1:], file, 10**9)
    assert file.read_bytes() == whole


def test_a_file_that_is_whole_stays(llm: LLM, tmp_path: Path) -> None:
    for taps, name in ((TAPS[1:], "s.bin"), (TAPS, "wide.bin"), (TAPS[1:], "s.bin")):
        read_states(llm, DIALOGUES, taps, tmp_path / name, 10**9)
    assert (tmp_path / "s.bin").exists()


@pytest.mark.parametrize("key", ["model", "dtype", "backend", "hidden", "dialogues"])
def test_a_file_of_another_origin_does_not_serve(llm: LLM, tmp_path: Path, key: str) -> None:
    read_states(llm, DIALOGUES, TAPS, tmp_path / "wide.bin", 10**9)
    told = tmp_path / "wide.bin.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), key: "another"}))
    read_states(llm, DIALOGUES, TAPS[:1], tmp_path / "s.bin", 10**9)
    assert (tmp_path / "s.bin").exists()


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
