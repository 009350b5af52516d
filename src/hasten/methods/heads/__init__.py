"""Heads: drafters that read the target's own hidden states, trained for one target; one file each."""

from hasten.methods.heads import eagle, hydra, medusa, ppd

__all__ = ["eagle", "hydra", "medusa", "ppd"]
