"""Denoising policies and block decoders for diffusion language models, one file each."""

from hasten.methods.diffusion import denoise, threshold

__all__ = ["denoise", "threshold"]
