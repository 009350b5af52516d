"""Where tests of GPU kernels run: on a GPU, or in Triton's interpreter; without either the test file is skipped."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU, Triton must be imported with TRITON_INTERPRET=1", allow_module_level=True)
