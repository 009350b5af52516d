"""The verify-cost curve: interpolation, measurement, and the record on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from hasten.engine.drafting import cost
from hasten.engine.drafting.cost import VerifyCost
from hasten.model import OracleModel

CURVE = VerifyCost(
    rows=(1, 2, 4, 8),
    contexts=(100, 300),
    seconds=((1.0, 1.2, 1.6, 2.4), (2.0, 2.2, 2.6, 3.4)),
    per_sequence=0.1,
)


def test_between_the_points_the_curve_is_linear():
    assert CURVE.of(1, 100) == pytest.approx(1.0)
    assert CURVE.of(3, 100) == pytest.approx(1.4)
    assert CURVE.of(6, 100) == pytest.approx(2.0)
    assert CURVE.of(1, 200) == pytest.approx(1.5)
    assert CURVE.of(6, 250) == pytest.approx(2.75)
    assert CURVE.of(1.5, 100) == pytest.approx(1.1)


def test_outside_the_points():
    assert CURVE.of(10, 100) == pytest.approx(2.8)  # as it went before
    assert CURVE.of(1, 10) == CURVE.of(1, 100)
    assert CURVE.of(1, 5000) == CURVE.of(1, 300)


def test_further_sequences_cost_extra():
    assert CURVE.of(4, 100, batch=3) == pytest.approx(1.8)


def test_ratio_is_relative_to_one_row():
    assert CURVE.ratio(8, 100) == pytest.approx(2.4)
    assert CURVE.ratio(8, 300) == pytest.approx(1.7)


def test_noise_never_makes_more_rows_cheaper():
    noisy = VerifyCost((1, 2, 4), (64,), ((1.0, 0.7, 1.5),), 0.0)
    seconds = [noisy.of(rows, 64) for rows in range(1, 12)]
    assert seconds == sorted(seconds)


def test_every_shape_is_timed(llm):
    times = cost.step_seconds(llm.model, [(1, 1), (1, 4), (3, 2)], context=32, repeats=3)
    assert times.keys() == {(1, 1), (1, 4), (3, 2)} and all(seconds > 0 for seconds in times.values())


NAN = '{"rows": [1], "contexts": [1], "seconds": [[NaN]], "per_sequence": 0}'


def test_an_oracle_is_measured(monkeypatch):
    monkeypatch.setattr(cost, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(cost, "ROWS", (1, 2, 8))
    monkeypatch.setattr(cost, "CONTEXTS", (8, 16))
    curve = cost.verify_cost(OracleModel(lambda history: torch.zeros(5), 5, 64), None)
    assert curve.rows == (1, 2, 8) and curve.contexts == (8, 16)
    assert 0 < curve.of(1, 8) <= curve.of(8, 8)


def test_a_measured_curve_is_kept_on_disk(monkeypatch, tmp_path, llm):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "measure", lambda model: CURVE)
    assert cost.verify_cost(llm.model, str(llm.folder)) == CURVE
    (record,) = (tmp_path / "verify-cost").iterdir()
    assert json.loads(record.read_text())["subject"]["model"] == str(llm.folder)

    def again(model):
        raise AssertionError("measured twice")

    monkeypatch.setattr(cost, "measure", again)
    assert cost.verify_cost(llm.model, str(llm.folder)) == CURVE


@pytest.mark.parametrize("share, kept", [(0.6, False), (0.95, True)])
def test_a_curve_of_a_busy_machine_is_measured_again_after_a_while(monkeypatch, tmp_path, llm, share, kept):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    clock = [0.0]

    def measured(model):
        clock[0] += 1.0
        return CURVE

    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cost.time, "thread_time", lambda: share * clock[0])
    monkeypatch.setattr(cost, "measure", measured)
    for expected in (1, 1):
        cost.verify_cost(llm.model, str(llm.folder))
        assert clock[0] == expected
    (record,) = (tmp_path / "verify-cost").iterdir()
    hours_ago = record.stat().st_mtime - 2 * 3600
    os.utime(record, (hours_ago, hours_ago))
    cost.verify_cost(llm.model, str(llm.folder))
    assert clock[0] == (1 if kept else 2)


def test_weights_that_are_stored_otherwise_have_a_curve_of_their_own(monkeypatch, tmp_path, llm):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "measure", lambda model: CURVE)
    for size in (llm.model.weight_bytes(), 100):
        monkeypatch.setattr(llm.model, "weight_bytes", lambda size=size: size)
        cost.verify_cost(llm.model, str(llm.folder))
    assert len(list((tmp_path / "verify-cost").iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": [1]}', '{"rows": 3, "contexts": [], "seconds": []}', NAN])
def test_a_damaged_record_is_measured_again(monkeypatch, tmp_path, llm, content):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "measure", lambda model: CURVE)
    cost.verify_cost(llm.model, str(llm.folder))
    (record,) = (tmp_path / "verify-cost").iterdir()
    record.write_text(content)
    assert cost.verify_cost(llm.model, str(llm.folder)) == CURVE
    assert json.loads(record.read_text())["rows"] == [1, 2, 4, 8]


def test_a_folder_that_cannot_be_written_costs_no_more_than_a_measurement(monkeypatch, tmp_path, llm):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cost, "measure", lambda model: CURVE)
    assert cost.verify_cost(llm.model, str(llm.folder)) == CURVE


def test_a_record_that_cannot_be_kept_leaves_nothing(monkeypatch, tmp_path, llm):
    def refuse(*names: object) -> None:
        raise OSError("no room")

    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "measure", lambda model: CURVE)
    monkeypatch.setattr(cost.os, "replace", refuse)
    assert cost.verify_cost(llm.model, str(llm.folder)) == CURVE
    assert list((tmp_path / "verify-cost").iterdir()) == []


def test_only_the_weights_that_are_read_count(monkeypatch, tmp_path, llm):
    folder = Path(shutil.copytree(llm.folder, tmp_path / "model"))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "measure", lambda model: CURVE)
    cost.verify_cost(llm.model, str(folder))
    (folder / "stray.safetensors").symlink_to("nowhere")
    cost.verify_cost(llm.model, str(folder))
    assert len(list((tmp_path / "cache/verify-cost").iterdir())) == 1
