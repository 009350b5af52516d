"""Numbers of a dataclass that are none are refused, wherever such a dataclass is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan
from typing import Any

import pytest

from hasten.errors import UserError, require_finite
from hasten.train.learn2pd import FilterConfig
from hasten.train.lm import Pretraining


@dataclass
class Settings:
    share: float = 0.5
    count: int = 10**400
    name: str = "nan"
    missing: float | None = None


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_nan_and_infinity(value: float) -> None:
    require_finite(Settings())
    with pytest.raises(UserError, match=f"^it: share must be a finite number, not {value}$"):
        require_finite(Settings(value), "it")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Pretraining, "lr"), (Pretraining, "warmup"), (Pretraining, "curriculum"), (FilterConfig, "lr")],
)
@pytest.mark.parametrize("value", [nan, inf])
def test_of_trainings(kind: Any, name: str, value: float) -> None:
    with pytest.raises(UserError, match=r"finite|positive"):
        kind(**{name: value})
