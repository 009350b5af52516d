"""Several processes of one run share its batches, and come to what one process comes to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_run import recipe
from torch import Tensor

from hasten.errors import UserError
from hasten.train import processes
from hasten.train.trainer import train

SCRIPT = Path(__file__).with_name("shared_run.py")


def together(folder: Path, batches_per_step: int = 2, stop: int = 0, count: int = 2) -> list[str]:
    """What so many processes print that are started as `torchrun` starts them."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(batches_per_step), str(stop)]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(number)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), said
    return [out for out, _ in said]


def network(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(folder / "network.pt", weights_only=True)
    return tensors


def computed(folder: Path) -> list[list[str]]:
    return [(folder / f"computed-{number}.txt").read_text().splitlines() for number in range(2)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    together(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process, with as many batches of a step."""
    folder = tmp_path_factory.mktemp("alone")
    train(recipe(2), folder)
    return folder


def test_they_come_to_what_one_comes_to(shared: Path, alone: Path) -> None:
    one, other = network(alone), network(shared)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)
    summaries = [json.loads((folder / "training.json").read_text()) for folder in (alone, shared)]
    assert summaries[0]["loss"] == pytest.approx(summaries[1]["loss"], abs=2e-4)
    for name in ("tokens", "data_sha256", "config", "parameters"):
        assert summaries[0][name] == summaries[1][name]
    # It did learn, and what learns from nothing stayed as it began.
    begun = recipe(2).begin(alone)[0].state_dict()
    assert (one["table.weight"] - begun["table.weight"]).abs().max() > 0.1
    assert torch.equal(other["heads.2.weight"], begun["heads.2.weight"])


def test_each_batch_is_computed_by_one_of_them(shared: Path) -> None:
    first, second = computed(shared)
    assert not set(first) & set(second)
    lengths = [[int(line.split()[1]) for line in lines] for lines in (first, second)]
    steps = [[int(line.split()[0]) for line in lines] for lines in (first, second)]
    # Of a pool's three steps the last one has a batch for the first process only.
    assert steps[0] == list(range(1, len(first) + 1)) and steps[1] == [step for step in steps[0] if step % 3]
    pools = len(first) // 3
    assert pools > 3
    for pool in range(pools):
        seen = lengths[0][3 * pool : 3 * pool + 3] + lengths[1][2 * pool : 2 * pool + 2]
        assert sorted(seen) == [3, 7, 11, 15, 19]


def test_the_first_writes_all(shared: Path) -> None:
    names = {file.name for file in shared.iterdir()}
    assert names == {"prepared.txt", "network.pt", "training.json", "computed-0.txt", "computed-1.txt"}


def test_one_is_interrupted_both_stop_and_go_on_to_the_same_bytes(shared: Path, tmp_path: Path) -> None:
    assert together(tmp_path, stop=8) == ["interrupted\n", "interrupted\n"]
    assert (tmp_path / "training.pt").exists() and not (tmp_path / "network.pt").exists()
    assert together(tmp_path) == ["", ""]
    assert (tmp_path / "network.pt").read_bytes() == (shared / "network.pt").read_bytes()


def test_more_processes_than_batches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "told", lambda own: [own])
    monkeypatch.setattr(processes.dist, "barrier", lambda: None)
    with pytest.raises(UserError, match="batches for 2, and there are 3 processes"):
        train(recipe(2), tmp_path)


def test_a_run_from_before_there_was_a_setting_is_gone_on_with(alone: Path) -> None:
    file = alone / "training.json"
    told = json.loads(file.read_text())
    old = {name: value for name, value in told["config"].items() if name != "seed"}
    file.write_text(json.dumps({**told, "config": old}))
    assert train(recipe(2), alone)["tokens"] == told["tokens"]
    file.write_text(json.dumps({**told, "config": {**old, "seed": 3}}))
    with pytest.raises(UserError, match="another seed"):
        train(recipe(2), alone)
