"""Heads: drafters that read the target's own hidden states, trained for one target; one file each."""

from hasten.methods.heads import medusa

__all__ = ["medusa"]
