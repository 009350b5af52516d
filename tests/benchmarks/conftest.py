"""`benchmarks/peers` is no package: its files import each other as `python benchmarks/peers` lets them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
