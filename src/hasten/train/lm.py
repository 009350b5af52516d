"""Pre-train a small Llama-architecture language model: `hasten train lm`.

Muon on the matrices inside the layers, AdamW on embeddings and norms, cosine schedule with warm-up, a curriculum from
short to long tasks, and a checkpoint that resumes to the very same run.
"""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.errors import UserError
from hasten.train.data import IGNORE, Batch, Mixture
from hasten.train.tokenizer import load_tokenizer, train_tokenizer

CHECKPOINT = "training.pt"
LOG_SECONDS = 20
SHORT = 0.1
"""Difficulty in the opening."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; a resumed run must have the same.

    `tokens` counts padding and prompts. `opening` is the share of the run that has short
    copying tasks only; `curriculum` the share after which tasks have full length.
    `warmup` and `final_lr` are shares of the run and of `lr`.
    """

    hidden: int = 256
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 640
    vocabulary: int = 2048
    context: int = 1024
    tokens: int = 26_000_000
    batch_tokens: int = 2048
    lr: float = 2.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.02
    final_lr: float = 0.02
    opening: float = 0.07
    curriculum: float = 0.65
    seed: int = 0
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision must be bf16 or fp32, not {self.precision!r}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise UserError("hidden must be a multiple of heads, and heads a multiple of kv-heads")
        if min(self.layers, self.tokens, self.batch_tokens, self.ffn) < 1 or self.vocabulary < 300:
            raise UserError("layers, ffn, tokens and batch-tokens must be positive, vocabulary at least 300")
        if self.batch_tokens < self.context:
            raise UserError(f"batch-tokens ({self.batch_tokens}) must be at least the context ({self.context})")


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model of the run's shape, with tied embeddings."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            initializer_range=0.5 / math.sqrt(config.hidden),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # On CPU, the fused attention kernel takes two fifths of a step of such short rows; this one takes a tenth.
    model.set_attn_implementation("eager")
    return model


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) over labelled tokens; the head runs on their rows only."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    wanted = labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[wanted])


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to `final_lr`; `progress` runs from 0 to 1."""
    if progress < config.warmup:
        return config.lr * max(progress, 1e-4) / config.warmup
    phase = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * phase)))


def difficulty(progress: float, config: TrainConfig) -> float:
    """Length cap of the tasks: short in the opening, then growing linearly to full length."""
    grown = (progress - config.opening) / max(config.curriculum - config.opening, 1e-6)
    return SHORT + (1 - SHORT) * min(1.0, max(0.0, grown))


class Trainer:
    """One run: model, optimisers, stream and counters, resumable from `folder/training.pt`."""

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.config, self.tokenizer, self.folder = config, tokenizer, folder
        self.model = build_model(config, tokenizer)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in n]
        others = [p for n, p in self.model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.mixture = Mixture(
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            end=tokenizer.eos_token_id,
            batch_tokens=config.batch_tokens,
            context=config.context,
            seed=config.seed,
        )
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
                self.pool_progress = self.tokens / self.config.tokens
            pool = self.mixture.pool(
                self.pool,
                difficulty(self.pool_progress, self.config),
                opening=self.pool_progress < self.config.opening,
            )
            while self.index < len(pool):
                yield pool[self.index]
                self.index += 1
            self.pool, self.index = self.pool + 1, 0

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        started = time.perf_counter()
        rate = learning_rate(self.tokens / self.config.tokens, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = answer_loss(self.model, batch)
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
            "config": asdict(self.config),
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
        if state["config"] != asdict(self.config):
            changed = [key for key, value in asdict(self.config).items() if state["config"].get(key) != value]
            raise UserError(f"the checkpoint in {self.folder} was made with another {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])

    def export(self) -> None:
        """Write the Hugging Face folder: bf16 weights, configuration, generation config, tokenizer."""
        model = LlamaForCausalLM(self.model.config)
        model.load_state_dict(self.model.state_dict())
        model.bfloat16().save_pretrained(self.folder, max_shard_size="15MB")
        self.tokenizer.save_pretrained(self.folder)


_COUNTERS = ("tokens", "pool", "index", "pool_progress", "loss", "seconds", "history", "data_hash")


def train(
    config: TrainConfig,
    folder: Path,
    tokenizer_folder: Path | None = None,
    resume: bool = True,
    save_every: float = 60,
) -> dict[str, Any]:
    """Run (or resume) training, export the model and return a summary.

    Args:
        config: the run.
        folder: output; `training.pt` inside it is the checkpoint and is kept until the run is complete.
        tokenizer_folder: take the tokenizer from this model folder instead of training one.
        resume: continue from a checkpoint that is there; otherwise one that is there is an error.
        save_every: seconds between checkpoints.

    Raises:
        UserError: the checkpoint does not fit, or the output cannot be written.
        KeyboardInterrupt: after saving a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise UserError(f"{checkpoint} exists: resume it, or remove it to start again")
    if checkpoint.exists():
        tokenizer = load_tokenizer(folder)
    elif tokenizer_folder is not None:
        tokenizer = load_tokenizer(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(config.vocabulary, config.context, seed=config.seed)
    tokenizer.save_pretrained(folder)
    trainer = Trainer(config, tokenizer, folder)
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
        "config": asdict(config),
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
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
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=trainer.config.tokens, completed=trainer.tokens)
        saved = logged = time.monotonic()
        with _interrupt_between_steps() as interrupted:
            for batch in trainer.batches():
                if trainer.tokens >= trainer.config.tokens or interrupted():
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
