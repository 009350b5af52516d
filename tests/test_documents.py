"""JSON documents hold nothing that a strict reader refuses."""

from __future__ import annotations

import json
from math import inf, nan
from typing import Any

from hasten.cli import options
from hasten.documents import dumps

DOCUMENT = {"loss": nan, "bounds": (-inf, 1.5, inf), "nested": [{"a": [nan]}, None, True, "NaN", 3], 7: 2.0}
STRICT = {"loss": None, "bounds": [None, 1.5, None], "nested": [{"a": [None]}, None, True, "NaN", 3], "7": 2.0}


def strict(text: str) -> Any:
    """Read as the standard says: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_figures_that_do_not_exist_are_null() -> None:
    assert strict(dumps(DOCUMENT)) == STRICT
    assert dumps({"a": [1.0, "é"]}, ensure_ascii=False) == '{"a": [1.0, "é"]}'


def test_what_a_command_prints(capsys: Any) -> None:
    options.emit(DOCUMENT)
    printed = capsys.readouterr().out
    assert strict(printed) == STRICT
    assert printed.endswith("}\n")
