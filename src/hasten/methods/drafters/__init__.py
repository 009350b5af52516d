"""Drafters: training-free and trained proposers, one file each."""

from hasten.methods.drafters import (
    aded,
    auto,
    blend,
    copyspec,
    draft_model,
    dyspec,
    ngram,
    plain,
    rapid,
    s2d,
    specmemo,
    stand,
    suffix,
    tidar,
    token_recycling,
    vocabtrim,
)

__all__ = [
    "aded",
    "auto",
    "blend",
    "copyspec",
    "draft_model",
    "dyspec",
    "ngram",
    "plain",
    "rapid",
    "s2d",
    "specmemo",
    "stand",
    "suffix",
    "tidar",
    "token_recycling",
    "vocabtrim",
]
