"""Heads: drafters that read the target's own hidden states, trained for one target; one file each."""

from hasten.methods.heads import chimera, eagle, hidden_transfer, hydra, medusa, ppd

__all__ = ["chimera", "eagle", "hidden_transfer", "hydra", "medusa", "ppd"]
