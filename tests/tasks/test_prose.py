"""Prose: there is enough of it, and no document is in both splits."""

from __future__ import annotations

from itertools import islice

from hasten.tasks import prose_chunks, prose_documents
from hasten.tasks.prose import is_data


def test_splits_are_disjoint_and_filled() -> None:
    train, test = list(prose_documents("train")), list(prose_documents("test"))
    assert len(train) > 100 and len(test) > 5
    assert not set(train) & set(test)


def test_chunks_end_at_lines() -> None:
    chunks = list(islice(prose_chunks("test", 500), 50))
    assert chunks and all(len(chunk) <= 500 or chunk.count("\n") <= 1 for chunk in chunks)
    text = "".join(prose_documents("test"))
    assert text.startswith("".join(chunks[:5]))


def test_tables_are_not_prose() -> None:
    assert is_data("")
    assert is_data("0x12, 0x34, 0x56,\n" * 20)
    assert not is_data("def f(x):\n    return x\n")
