"""A training run of whatever a recipe says, resumable to the same end."""

from __future__ import annotations

import hashlib
import math
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hasten.documents import dumps
from hasten.errors import Interrupted, UserError
from hasten.files import make_folder, replacing, write_text, writing
from hasten.train import processes
from hasten.train.interruptions import between_steps
from hasten.train.recipe import TIMES, AnyRecipe, Trained
from hasten.train.settings import complete, differences
from hasten.train.summary import SUMMARY, read_summary

CHECKPOINT = "training.pt"
LOG_SECONDS = 20
TOKEN_BYTES = torch.int64.itemsize


class Trainer:
    """One run: model, optimisers, stream and counters, resumable from `folder/training.pt`."""

    def __init__(self, recipe: AnyRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        if recipe.batches_per_step < processes.count():
            few, many = recipe.batches_per_step, processes.count()
            raise UserError(f"a step of this run has batches for {few}, and there are {many} processes")
        self.model, self.stream = recipe.begin(folder)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        processes.as_first(self.parameters)
        self.optimizers = recipe.optimizers(self.model)
        self.tokens = self.pool = self.index = 0
        self.pool_progress = 0.0
        self.loss = math.nan
        self.seconds = 0.0
        self.history: list[tuple[int, float]] = []
        self.data_hash = ""

    def batches(self) -> Iterator[Sequence[Trained]]:
        """The rest of the stream, a step's batches at a time, from the batch that `pool` and `index` point at.

        `step` moves these on.
        """
        while True:
            # A pool's difficulty is fixed when it is opened, so that a resumed run rebuilds it exactly.
            if self.index == 0:
                self.pool_progress = self.tokens / self.recipe.tokens
            pool = self.recipe.pool(self.stream, self.pool, self.pool_progress)
            while self.index < len(pool):
                yield pool[self.index : self.index + self.recipe.batches_per_step]
            self.pool, self.index = self.pool + 1, 0

    def step(self, batches: Sequence[Trained]) -> None:
        """One optimiser step by the mean of some batches' losses; then all counters are those of the batch to come.

        Each process computes some of the batches, and reads no others.
        """
        started = time.perf_counter()
        progress = self.tokens / self.recipe.tokens
        rate = self.recipe.learning_rate(progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get(TIMES, 1.0)
        own = []
        for place in range(processes.number(), len(batches), processes.count()):
            batch = batches[place]
            # A function of what was trained on so far, so that a resumed run draws the same noise.
            generator = torch.Generator().manual_seed((self.recipe.seed << 40) + self.tokens + place)
            loss = self.recipe.loss(self.model, batch, progress, generator) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            own.append((place, loss.item(), batch.ids.numpy().tobytes()))
        processes.add_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = sorted(chain.from_iterable(processes.told(own)))
        self.index += len(batches)
        for _, _, ids in done:
            self.tokens += len(ids) // TOKEN_BYTES
            self.data_hash = hashlib.sha256(self.data_hash.encode() + ids).hexdigest()
        mean = math.fsum(loss for _, loss, _ in done)
        self.loss = mean if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * mean
        self.seconds += time.perf_counter() - started

    def save(self) -> None:
        """Replace the checkpoint, if this is the first process; one that was there stays if that fails.

        Raises:
            UserError: it cannot be written.
        """
        if not processes.first():
            return
        state = {
            "config": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }
        with replacing(self.folder / CHECKPOINT) as fresh, fresh.open("wb") as stream:
            torch.save(state, stream)

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises:
            UserError: the checkpoint was made with another configuration, or cannot be read.
        """
        file = self.folder / CHECKPOINT
        try:
            with zipfile.ZipFile(file) as archive:
                # PyTorch writes checksums, but does not look at them.
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} has another checksum")
            state = torch.load(file, weights_only=True)
            if not isinstance(state, dict):
                raise TypeError("it is no dictionary")
            changed = differences(complete(self.recipe, state["config"]), asdict(self.recipe))
            if not changed:
                self._restore(state)
        except Exception as error:
            # What is damaged raises one of a dozen unrelated classes.
            raise UserError(f"cannot read {file}: it is damaged, or no checkpoint") from error
        if changed:
            raise UserError(f"the checkpoint in {self.folder} was made with another {changed}")

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `save` wrote; whatever exception says that it does not fit."""
        for name in _COUNTERS:
            value = state["counters"][name]
            if type(value) is not type(getattr(self, name)):
                raise TypeError(f"{name} is {value!r}")
            setattr(self, name, value)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            if bool(optimizer.state) != bool(self.tokens):
                raise ValueError("the optimiser has forgotten its steps, or has made some too early")
            # `load_state_dict` looks at no shapes. What is kept of a parameter is a number, or has its shape.
            for parameter, kept in optimizer.state.items():
                if not all(value.shape in ((), parameter.shape) for value in kept.values()):
                    raise ValueError("the optimiser is another model's")

    def export(self) -> None:
        """Write what was trained into the folder.

        Raises:
            UserError: they cannot be written.
        """
        with writing(self.folder):
            self.recipe.export(deepcopy(self.model), self.folder)


_COUNTERS = ("tokens", "pool", "index", "pool_progress", "loss", "seconds", "history", "data_hash")


def train(
    recipe: AnyRecipe,
    folder: Path,
    resume: bool = True,
    save_every: float = 60,
) -> dict[str, Any]:
    """Run (or resume) training, export the model and return a summary, which `training.json` keeps.

    However often a run is killed and resumed, at whatever moment, it ends in the same model. A run that is complete is
    not made again. Processes that `torchrun` started share the batches of each step; the first of them writes files.

    Args:
        recipe: the run.
        folder: output; `training.pt` inside it is the checkpoint and is kept until the run is complete.
        resume: continue from a checkpoint, or take a finished model, that is there; otherwise either is an error.
        save_every: seconds between checkpoints.

    Raises:
        UserError: what is there does not fit or is damaged, or the output cannot be written.
        Interrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
        KeyboardInterrupt: a second Ctrl-C.
    """
    make_folder(folder)
    checkpoint, summary_file = folder / CHECKPOINT, folder / SUMMARY
    with processes.first_alone():
        for file in (checkpoint, summary_file):
            if file.exists() and not resume:
                raise UserError(f"{file} exists: resume it, or remove it to start again")
        begun, finished = checkpoint.exists(), summary_file.exists()
        # Only here: a checkpoint that is there needs what it was made with, which no kill may tear.
        if not begun and not finished and processes.first():
            with writing(folder):
                recipe.prepare(folder)
    if finished and not begun:
        return read_summary(recipe, summary_file)
    trainer = Trainer(recipe, folder)
    if begun:
        trainer.resume()
    _loop(trainer, save_every)
    summary = {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "loss": round(trainer.loss, 4),
        "data_sha256": trainer.data_hash,
        "config": asdict(recipe),
    }
    with processes.first_alone():
        if processes.first():
            trainer.export()
            # What says that the run is complete comes after all else.
            write_text(summary_file, dumps(summary, indent=2) + "\n")
            checkpoint.unlink(missing_ok=True)
    return summary


def _loop(trainer: Trainer, save_every: float) -> None:
    """Steps until the token budget is spent, with a progress bar and regular checkpoints."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=not processes.first())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=trainer.recipe.tokens, completed=trainer.tokens)
        saved = logged = time.monotonic()
        with between_steps() as interrupted:
            for batches in trainer.batches():
                # Of all processes: none may wait for one that has gone.
                number = max(processes.told(interrupted()))
                if trainer.tokens >= trainer.recipe.tokens or number:
                    break
                trainer.step(batches)
                rate = trainer.tokens / max(trainer.seconds, 1e-9)
                status = f"loss {trainer.loss:.3f}  {rate:,.0f} tokens/s"
                progress.update(bar, completed=trainer.tokens, description=status)
                now = time.monotonic()
                if now - logged > LOG_SECONDS:
                    trainer.history.append((trainer.tokens, round(trainer.loss, 4)))
                    logged = now
                    if not console.is_terminal:
                        console.print(f"{trainer.tokens:,} tokens  {status}")
                if now - saved >= save_every:
                    trainer.save()
                    saved = now
            trainer.save()
            if number:
                sentence = f"interrupted: {trainer.folder / CHECKPOINT} is saved, and the same command goes on from it"
                raise Interrupted(sentence, number)
