"""The default forward pass as one native call: see `step.cpp`, and `backend.py` for who may use it."""

from hasten.model.native.backend import NativeBackend, refusal
from hasten.model.native.library import kernels
from hasten.model.native.rounding import Rounded

__all__ = ["NativeBackend", "Rounded", "kernels", "refusal"]
