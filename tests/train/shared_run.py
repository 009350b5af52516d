"""A small run, as each of several processes makes it: `python shared_run.py FOLDER BATCHES_PER_STEP STOP`."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import Interrupted
from hasten.files import write_text
from hasten.train import processes
from hasten.train.recipe import Schedule
from hasten.train.trainer import Trainer, train

WORDS, WIDTH = 12, 8


@dataclass(frozen=True)
class Texts:
    """Tokens [rows], of which each is to be said from the one before."""

    ids: Tensor


class Network(nn.Module):
    """A table and a head; the second head learns from every other batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WORDS) for _ in range(3))


@dataclass(frozen=True)
class Chain(Schedule[Network, list[Texts], Texts]):
    """Texts of different lengths, five batches in a pool: the last step of a pool has one batch where steps have two.

    Noise enters the loss, and there is a head that never learns.
    """

    def prepare(self, folder: Path) -> None:
        write_text(folder / "prepared.txt", str(os.getpid()))

    def begin(self, folder: Path) -> tuple[Network, list[Texts]]:
        # Each process begins elsewhere: what the first one has counts.
        torch.manual_seed(self.seed + processes.number())
        draw = torch.Generator().manual_seed(self.seed)
        return Network(), [Texts(torch.randint(WORDS, (3 + 4 * number,), generator=draw)) for number in range(5)]

    def optimizers(self, model: Network) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))]

    def pool(self, pools: list[Texts], number: int, progress: float) -> Sequence[Texts]:
        return random.Random(number).sample(pools, len(pools))

    def loss(self, model: Network, batch: Texts, progress: float, generator: torch.Generator) -> Tensor:
        states = model.table(batch.ids[:-1])
        states = states + 0.1 * torch.randn(states.shape, generator=generator)
        losses = F.cross_entropy(model.heads[0](states), batch.ids[1:])
        if len(batch.ids) % 8 == 3:
            losses = losses + F.cross_entropy(model.heads[1](states), batch.ids[:-1])
        return losses

    def export(self, model: Network, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "network.pt")


def recipe(batches_per_step: int) -> Chain:
    """Of about thirty steps."""
    return Chain(tokens=600, batch_tokens=64, lr=1e-2, batches_per_step=batches_per_step)


def main(folder: Path, batches_per_step: int, stop: int) -> None:
    """Train; the last process is interrupted before its step `stop`. Each writes down what it computed."""
    torch.set_num_threads(1)
    computed, loss, step, steps = [], Chain.loss, Trainer.step, 0

    def noted(self: Chain, model: Network, batch: Texts, progress: float, generator: torch.Generator) -> Tensor:
        computed.append(f"{steps} {len(batch.ids)}")
        return loss(self, model, batch, progress, generator)

    def counted(self: Trainer, batches: Sequence[Texts]) -> None:
        nonlocal steps
        steps += 1
        if steps == stop and processes.number() == processes.count() - 1:
            signal.raise_signal(signal.SIGTERM)
        step(self, batches)

    Chain.loss, Trainer.step = noted, counted  # type: ignore[method-assign]
    with processes.joined() if "RANK" in os.environ else nullcontext():
        try:
            train(recipe(batches_per_step), folder)
        except Interrupted:
            print("interrupted")
        write_text(folder / f"computed-{processes.number()}.txt", "\n".join(computed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
