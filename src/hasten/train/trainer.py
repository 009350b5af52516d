"""A training run: Muon on the matrices inside the layers, AdamW on embeddings and norms, resumable to the same end."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from hasten.errors import UserError
from hasten.train.data import Batch
from hasten.train.recipe import Recipe
from hasten.train.tokenizer import load_tokenizer

CHECKPOINT = "training.pt"
LOG_SECONDS = 20


class Trainer:
    """One run: model, optimisers, stream and counters, resumable from `folder/training.pt`."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.recipe, self.tokenizer, self.folder = recipe, tokenizer, folder
        self.model = recipe.build(tokenizer)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in n]
        others = [p for n, p in self.model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.stream = recipe.stream(tokenizer, folder)
        self.tokens = self.pool = self.index = 0
        self.pool_progress = 0.0
        self.loss = math.nan
        self.seconds = 0.0
        self.history: list[tuple[int, float]] = []
        self.data_hash = ""

    def batches(self) -> Iterator[Batch]:
        """The rest of the stream; `pool` and `index` point at the batch to come, or at the one being trained on."""
        while True:
            # A pool's difficulty is fixed when it is opened, so that a resumed run rebuilds it exactly.
            if self.index == 0:
                self.pool_progress = self.tokens / self.recipe.tokens
            pool = self.stream.pool(
                self.pool,
                self.recipe.difficulty(self.pool_progress),
                opening=self.pool_progress < self.recipe.opening,
            )
            while self.index < len(pool):
                yield pool[self.index]
                self.index += 1
            self.pool, self.index = self.pool + 1, 0

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        started = time.perf_counter()
        progress = self.tokens / self.recipe.tokens
        rate = self.recipe.learning_rate(progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        # A function of what was trained on so far, so that a resumed run draws the same noise.
        generator = torch.Generator().manual_seed((self.recipe.seed << 40) + self.tokens)
        loss = self.recipe.loss(self.model, batch, progress, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += batch.ids.numel()
        self.loss = loss.item() if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss.item()
        self.data_hash = hashlib.sha256(self.data_hash.encode() + batch.ids.numpy().tobytes()).hexdigest()
        self.seconds += time.perf_counter() - started

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it: an interrupted save loses nothing."""
        state = {
            "config": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }
        temporary = self.folder / (CHECKPOINT + ".new")
        torch.save(state, temporary)
        os.replace(temporary, self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises:
            UserError: the checkpoint was made with another configuration, or cannot be read.
        """
        try:
            state = torch.load(self.folder / CHECKPOINT, weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {self.folder / CHECKPOINT}: it is damaged, or no checkpoint") from error
        if state["config"] != asdict(self.recipe):
            changed = [key for key, value in asdict(self.recipe).items() if state["config"].get(key) != value]
            raise UserError(f"the checkpoint in {self.folder} was made with another {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])

    def export(self) -> None:
        """Write the Hugging Face folder: weights, configuration, generation config, tokenizer."""
        self.recipe.export(deepcopy(self.model), self.folder)
        self.tokenizer.save_pretrained(self.folder)


_COUNTERS = ("tokens", "pool", "index", "pool_progress", "loss", "seconds", "history", "data_hash")


def train(
    recipe: Recipe,
    folder: Path,
    resume: bool = True,
    save_every: float = 60,
) -> dict[str, Any]:
    """Run (or resume) training, export the model and return a summary.

    Args:
        recipe: the run.
        folder: output; `training.pt` inside it is the checkpoint and is kept until the run is complete.
        resume: continue from a checkpoint that is there; otherwise one that is there is an error.
        save_every: seconds between checkpoints.

    Raises:
        UserError: the checkpoint does not fit, or the output cannot be written.
        KeyboardInterrupt: after saving a checkpoint.
    """
    make_folder(folder)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise UserError(f"{checkpoint} exists: resume it, or remove it to start again")
    tokenizer = load_tokenizer(folder) if checkpoint.exists() else recipe.tokenizer()
    tokenizer.save_pretrained(folder)
    trainer = Trainer(recipe, tokenizer, folder)
    if checkpoint.exists():
        trainer.resume()
    _loop(trainer, save_every)
    trainer.export()
    summary = {
        "parameters": trainer.model.num_parameters(),
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "loss": round(trainer.loss, 4),
        "data_sha256": trainer.data_hash,
        "config": asdict(recipe),
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return summary


def make_folder(folder: Path) -> None:
    """Make a run's output folder if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def _loop(trainer: Trainer, save_every: float) -> None:
    """Steps until the token budget is spent, with a progress bar and regular checkpoints."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=trainer.recipe.tokens, completed=trainer.tokens)
        saved = logged = time.monotonic()
        with _interrupt_between_steps() as interrupted:
            for batch in trainer.batches():
                if trainer.tokens >= trainer.recipe.tokens or interrupted():
                    break
                trainer.step(batch)
                rate = trainer.tokens / max(trainer.seconds, 1e-9)
                status = f"loss {trainer.loss:.3f}  {rate:,.0f} tokens/s"
                progress.update(bar, completed=trainer.tokens, description=status)
                now = time.monotonic()
                if now - logged > LOG_SECONDS:
                    trainer.history.append((trainer.tokens, round(trainer.loss, 4)))
                    logged = now
                    if not console.is_terminal:
                        console.print(f"{trainer.tokens:,} tokens  {status}")
                if now - saved > save_every:
                    trainer.save()
                    saved = now
            trainer.save()
            if interrupted():
                raise KeyboardInterrupt


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of the step: half an update must not be saved. A second Ctrl-C does not wait."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
