"""Several processes of one run, as `torchrun` starts them: who is first, and what they tell each other.

Where there is one process only, all of this is nothing. All processes must see the same folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=30)
"""How long the others wait for the first process, which may have dialogues to write."""

Told = TypeVar("Told")


@contextmanager
def joined() -> Iterator[None]:
    """Meet the processes that were started together; tensors of GPUs are exchanged by NCCL, others by Gloo."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return number() == 0


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through; then the others do, and find what it left."""
    if not first():
        dist.barrier()
    yield
    if first() and count() > 1:
        dist.barrier()


def told(own: Told) -> list[Told]:
    """What each process says, by its number."""
    if count() == 1:
        return [own]
    others: list[Told] = [own] * count()
    dist.all_gather_object(others, own)
    return others


def as_first(parameters: Sequence[Tensor]) -> None:
    """Give each process what the first one has."""
    if count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Give each process the sum of all gradients; what none has one for stays without."""
    if count() == 1:
        return
    there = [any(each) for each in zip(*told([each.grad is not None for each in parameters]), strict=True)]
    learning = [parameter for parameter, some in zip(parameters, there, strict=True) if some]
    if not learning:
        return
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in learning if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, summed in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))
