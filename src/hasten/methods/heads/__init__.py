"""Heads: drafters that read the target's own hidden states, trained for one target; one file each."""

from hasten.methods.heads import eagle, hidden_transfer, hydra, medusa, ppd

__all__ = ["eagle", "hidden_transfer", "hydra", "medusa", "ppd"]
