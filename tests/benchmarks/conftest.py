"""`benchmarks/peers` is no package: its files import each other as `python benchmarks/peers` lets them.

So is `gguf_files`, which stands beside the tests of models.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
