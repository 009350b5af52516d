"""The rows of a pass, against transformers reading each text by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hasten.cache import Cache
from hasten.model import Rows, load_model

TEXTS = [[5, 9, 60, 31, 7], [8], [40, 3, 3, 12]]


def test_chains_of_several_sequences_are_each_its_own(make_checkpoint: Callable[..., Any]) -> None:
    """In one pass, and a chain behind what was committed."""
    checkpoint = make_checkpoint("llama")
    model = load_model(checkpoint.folder, "float32", backend="torch")
    cache = Cache(model.config.layers, model.cache_dtype, model.device)
    sequences = [cache.sequence() for _ in TEXTS]
    model.forward(Rows.of(sequences[0], TEXTS[0][:2], 0))
    sequences[0].commit(2)
    starts = [2, 0, 0]
    unread = [text[start:] for text, start in zip(TEXTS, starts, strict=True)]
    rows = Rows.of_several(list(zip(sequences, unread, starts, strict=True)))
    assert rows.tokens.tolist() == [60, 31, 7, 8, 40, 3, 3, 12]
    assert rows.positions.tolist() == [2, 3, 4, 0, 0, 1, 2, 3]
    assert [(span.sequence, span.start, span.stop) for span in rows.spans] == [
        (sequences[0], 0, 3), (sequences[1], 3, 4), (sequences[2], 4, 8)
    ]  # fmt: skip
    expected = [checkpoint.logits(text)[start:] for text, start in zip(TEXTS, starts, strict=True)]
    torch.testing.assert_close(model.forward(rows), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_no_chains_are_no_rows() -> None:
    rows = Rows.of_several([])
    assert rows.tokens.shape == rows.positions.shape == (0,) and rows.tokens.dtype == torch.int64 and not rows.spans
