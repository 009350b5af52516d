"""Skipping: the target itself, with some of its work left out, is the drafter. One file each."""

from hasten.methods.skipping import swift

__all__ = ["swift"]
