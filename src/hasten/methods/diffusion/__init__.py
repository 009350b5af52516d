"""Denoising policies and block decoders for diffusion language models, one file each."""

from hasten.methods.diffusion import (
    denoise,
    dparallel,
    fast_dllm_v2,
    freedave,
    learn2pd,
    localleap,
    nbdiff,
    prophet,
    threshold,
)

__all__ = [
    "denoise",
    "dparallel",
    "fast_dllm_v2",
    "freedave",
    "learn2pd",
    "localleap",
    "nbdiff",
    "prophet",
    "threshold",
]
