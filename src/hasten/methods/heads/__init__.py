"""Heads: drafters that read the target's own hidden states, trained for one target; one file each."""

from hasten.methods.heads import hidden_transfer, medusa, ppd

__all__ = ["hidden_transfer", "medusa", "ppd"]
