"""The default forward pass as one native call: see `step.cpp`, and `backend.py` for who may use it."""

from hasten.model.native.backend import NativeBackend, refusal

__all__ = ["NativeBackend", "refusal"]
