"""Files that are there whole or not at all, and what is said where they cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hasten.errors import UserError
from hasten.files import replacing, write_text, writing


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path):
    file = tmp_path / "file.txt"
    write_text(file, "é\n")
    with replacing(file) as fresh:
        fresh.write_text("half")
        assert file.read_text(encoding="utf-8") == "é\n"
        fresh.write_text("new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_what_fails_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as fresh:
        fresh.write_text("half")
        raise error
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_what_a_kill_left_is_written_over(tmp_path: Path):
    (tmp_path / "file.txt.new").write_text("half of something long")
    write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path):
    for target in (tmp_path, Path(os.devnull)):
        with pytest.raises(UserError, match="it is no file"):
            write_text(target, "text")
    assert Path(os.devnull).is_char_device()


def save_by_pytorch(path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(torch.zeros(3), stream)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("text"),
        save_by_pytorch,
        lambda path: save_file({"weight": torch.zeros(3)}, path),
    ],
    ids=["python", "pytorch", "safetensors"],
)
def test_what_the_system_refuses_is_one_sentence(tmp_path: Path, write):
    with pytest.raises(UserError) as refused, writing(tmp_path / "file"):
        write(tmp_path / "none" / "file")
    assert str(refused.value) == f"cannot write {tmp_path / 'file'}: No such file or directory"


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), writing(Path("file")):
        _ = 1 / 0
