"""Procedural tasks: questions with checkable answers, drawn in any number from a seed."""

from . import (  # noqa: F401  (importing a family registers its tasks)
    arithmetic,
    code,
    edit,
    json_extraction,
    lists,
    puzzles,
    retrieval,
    sql,
    tagging,
)
from .base import CATEGORIES, TASKS, Example, Split, Task, examples, get_task, register, split_of
from .prose import prose_chunks, prose_documents

__all__ = [
    "CATEGORIES",
    "TASKS",
    "Example",
    "Split",
    "Task",
    "examples",
    "get_task",
    "prose_chunks",
    "prose_documents",
    "register",
    "split_of",
]
