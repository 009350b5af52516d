"""A record of the cost curve that does not fit is as good as none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.drafting.cost import VerifyCost, _read

CURVE = VerifyCost((1, 2, 4), (8, 16), ((1.0, 1.5, 2.0), (2.0, 2.5, 3.0)), 0.1)
GOOD = {**asdict(CURVE), "computing": 0.95}


def read(text: str) -> VerifyCost | None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        file.write_text(text, encoding="utf-8")
        return _read(file)


def test_a_good_record():
    assert read(json.dumps(GOOD)) == CURVE


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": [1]},
        {"rows": [1, 2]},
        {"rows": ["1", "2", "4"]},
        {"rows": [1, 4, 2]},
        {"rows": [1, 2, 2]},
        {"rows": [1, 2, 10**9]},
        {"rows": [[1], [2], [4]]},
        {"contexts": []},
        {"contexts": [8]},
        {"contexts": [8.5, 16]},
        {"contexts": [0, 16]},
        {"seconds": []},
        {"seconds": [[1.0, 1.5, 2.0]]},
        {"seconds": [[1.0, 1.5], [2.0, 2.5]]},
        {"seconds": [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]},
        {"seconds": [[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]},
        {"per_sequence": None},
        {"per_sequence": "much"},
        {"computing": "all of it"},
    ],
)
def test_records_that_do_not_fit(change):
    assert read(json.dumps(GOOD | change)) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", "[" * 100_000, json.dumps(GOOD | {"per_sequence": 10**400})]
)
def test_files_that_are_no_records(text):
    assert read(text) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), values, max_size=4))
def test_any_record_is_a_curve_or_none(change):
    curve = read(json.dumps(GOOD | change))
    if curve is not None:
        assert curve.of(3, 12, 2) > -1e308
        assert curve.ratio(2) > 0
