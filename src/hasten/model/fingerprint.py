"""What tells models apart whose weights may be stored in any way."""

from __future__ import annotations

import hashlib

import torch

from hasten.model.decoder import Decoder


def fingerprint(model: Decoder) -> str:
    """Sixteen hexadecimal digits of a network's sizes and norms.

    Every precision and format keeps norms as they are, to bfloat16 at least, so a checkpoint has one fingerprint in
    all of them; a model that was trained further has another one.
    """
    digest = hashlib.sha256(f"{len(model.layers)} {tuple(model.embedding.shape)}".encode())
    norms = [model.norm, *(norm for layer in model.layers for norm in (layer.mixer_norm, layer.mlp_norm))]
    for norm in norms:
        digest.update(norm.weight.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
