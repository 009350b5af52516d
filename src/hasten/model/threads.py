"""The threads that a forward pass computes on: no more than there are cores, and in the process that they belong to."""

from __future__ import annotations

import os
import warnings

import torch

from hasten.errors import Notice, UserError

_home: int | None = None
"""The process that has loaded a model."""


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settle() -> None:
    """To be called before a model is loaded: its threads will be this process's, and no more than it has cores.

    Threads beyond that wait for each other at every barrier, and thousands of them end the process.

    Raises:
        UserError: see `refuse_fork`.
    """
    global _home
    refuse_fork()
    if _home is None:
        _home = os.getpid()
    if torch.get_num_threads() > cores():
        warnings.warn(
            f"PyTorch is set to {torch.get_num_threads()} threads; hasten sets it to {cores()}, the cores that this "
            "process has",
            Notice,
            stacklevel=3,
        )
        torch.set_num_threads(cores())


def refuse_fork() -> None:
    """Threads do not survive a fork: the first step that needs them would wait for ever.

    Raises:
        UserError: a process forked from one that had loaded a model, and more than one thread.
    """
    if _home not in (None, os.getpid()) and torch.get_num_threads() > 1:
        raise UserError(
            "this process was forked from one that had loaded a model, whose threads it does not have: start it by "
            "'spawn', load models after the fork only, or compute on one thread (torch.set_num_threads(1))"
        )
