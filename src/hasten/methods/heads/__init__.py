"""Heads: drafters that read the target's own hidden states, trained for one target; one file each."""

from hasten.methods.heads import medusa, ppd

__all__ = ["medusa", "ppd"]
