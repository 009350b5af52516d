"""Drafters: training-free and trained proposers, one file each."""

from hasten.methods.drafters import draft_model, ngram, plain

__all__ = ["draft_model", "ngram", "plain"]
