"""A training run that is killed, interrupted or out of room at any moment ends in the bytes of one that was not."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.cli import main
from hasten.errors import Interrupted, UserError
from hasten.train import data, trainer
from hasten.train.data import Batch
from hasten.train.lm import Pretraining
from hasten.train.summary import SUMMARY
from hasten.train.trainer import CHECKPOINT, Trainer, train
from helpers import Killed, interrupted_at, make_tokenizer


@dataclass(frozen=True)
class Short(Pretraining):
    """Without prose, which takes longer to read than all the rest."""

    weights: ClassVar[dict[str, float]] = {"copy": 1.0, "addition": 1.0}


RECIPE = Short(
    hidden=16, layers=1, heads=2, kv_heads=1, ffn=24, context=128, tokens=3_000, batch_tokens=256, precision="fp32",
    tokenizer_of="tiny",
)  # fmt: skip
POOL = 4
"""Batches of a pool, or one or two more: the run goes through several."""
STEPS = 17
LAST = 5
"""Step of the first pool."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hasten.train.lm", "hasten.train.trainer"])


@pytest.fixture(autouse=True)
def short_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "POOL_BATCHES", POOL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    places = []

    def step(self: Trainer, batch: Batch, run: Callable[..., None] = Trainer.step) -> None:
        places.append(self.pool)
        run(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "POOL_BATCHES", POOL)
        patch.setattr(Trainer, "step", step)
        train(RECIPE, folder)
    assert len(places) == STEPS and places.index(1) == LAST and places[-1] == 3
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its sixth step; copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "POOL_BATCHES", POOL)
        with interrupted_at(6):
            train(RECIPE, folder)
    return folder


def told(folder: Path) -> dict[str, Any]:
    """What the summary says, but for the time it took."""
    return {name: value for name, value in json.loads((folder / SUMMARY).read_text()).items() if name != "seconds"}


def check_same(folder: Path, whole: Path) -> None:
    assert told(folder) == told(whole)
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in whole.iterdir())
    for file in whole.iterdir():
        if file.name != SUMMARY:
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def before(number: int, run: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    """The function, with something done before its call of that number."""
    calls = count(1)

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            then(*arguments)
        return run(*arguments, **named)

    return counted


# Killed in a process of its own


def kill(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_saved(state: Any, stream: Any) -> None:
    """Half a checkpoint is written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    stream.write(buffer.getvalue()[: buffer.tell() // 2])
    stream.flush()
    kill()


def half_exported(self: Short, model: LlamaForCausalLM, folder: Path) -> None:
    Pretraining.export(self, model, folder)
    os.truncate(folder / "model.safetensors", 1_000)
    kill()


def half_tokenizer(self: PreTrainedTokenizerFast, folder: Path) -> None:
    (Path(folder) / "tokenizer.json").write_text('{"version"')
    kill()


def half_summary(file: Path, text: str) -> None:
    file.with_name(file.name + ".new").write_text(text[:20])
    kill()


def replaced(source: Path, target: Path, run: Callable[[Path, Path], None] = os.replace) -> None:
    if Path(target).name == SUMMARY:
        kill()
    run(source, target)


def unlinked(self: Path, missing_ok: bool = False) -> None:
    kill()


MOMENTS: dict[str, tuple[Any, str, Any]] = {
    "while the tokenizer is written": (PreTrainedTokenizerFast, "save_pretrained", half_tokenizer),
    "in the first step": (Short, "loss", kill),
    "in a step after a checkpoint": (Short, "loss", before(7, Short.loss, kill)),
    "in a checkpoint": (trainer.torch, "save", before(4, torch.save, half_saved)),
    "before a checkpoint is in its place": (os, "replace", before(5, os.replace, kill)),
    "right after a checkpoint": (trainer.time, "monotonic", before(9, trainer.time.monotonic, kill)),
    "in the export": (Short, "export", half_exported),
    "in the summary": (trainer, "write_text", half_summary),
    "before the summary is in its place": (os, "replace", replaced),
    "before the checkpoint is removed": (Path, "unlink", unlinked),
}


def child(folder: Path, moment: str) -> None:
    torch.set_num_threads(1)
    data.POOL_BATCHES = POOL
    owner, name, replacement = MOMENTS[moment]
    setattr(owner, name, replacement)
    train(RECIPE, folder, save_every=0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_in_the_same_bytes(moment: str, whole: Path, tmp_path: Path):
    process = FORKS.Process(target=child, args=(tmp_path, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    begun = moment not in ("while the tokenizer is written", "in the first step")
    assert (tmp_path / CHECKPOINT).exists() == begun
    assert (tmp_path / SUMMARY).exists() == (moment == "before the checkpoint is removed")
    assert (tmp_path / f"{CHECKPOINT}.new").exists() == ("a checkpoint" in moment and "after" not in moment)
    train(RECIPE, tmp_path)
    check_same(tmp_path, whole)


def terminated(folder: Path) -> None:
    """`hasten train lm` to which `timeout` sends its two signals in the third step; stderr goes to a file."""
    torch.set_num_threads(1)
    data.POOL_BATCHES = POOL
    sys.stderr = (folder.parent / "stderr").open("w", buffering=1)

    def twice(*arguments: Any) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)

    Trainer.step = before(3, Trainer.step, twice)  # type: ignore[method-assign]
    from hasten.train import lm

    lm.Pretraining = Short  # type: ignore[misc]
    sys.argv = ["hasten", "train", "lm", "-o", str(folder), "--tokenizer", "tiny", "--layers", "1"]
    settings = {name: getattr(RECIPE, name) for name in ("hidden", "heads", "kv_heads", "ffn", "context", "tokens")}
    for name, value in {**settings, "batch_tokens": 256, "precision": "fp32"}.items():
        sys.argv += [f"--{name.replace('_', '-')}", str(value)]
    main()


def test_sigterm_saves_a_checkpoint_between_two_steps(whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    process = FORKS.Process(target=terminated, args=(folder,))
    process.start()
    process.join(120)
    said = (tmp_path / "stderr").read_text()
    assert said == f"hasten: interrupted: {folder / CHECKPOINT} is saved, and the same command goes on from it\n"
    assert process.exitcode == 128 + signal.SIGTERM
    train(RECIPE, folder)
    check_same(folder, whole)


# Stopped in this process


@pytest.mark.parametrize("number", range(1, STEPS + 1))
def test_a_run_that_dies_in_any_step_ends_in_the_same_bytes(number: int, whole: Path, tmp_path: Path):
    def die(*arguments: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Short, "loss", before(number, Short.loss, die))
        train(RECIPE, tmp_path, save_every=0)
    train(RECIPE, tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(number: int, whole: Path, tmp_path: Path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for step in (1, LAST, LAST + 1, STEPS):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="is saved") as stop:
            patch.setattr(Trainer, "step", before(step, Trainer.step, lambda *_: signal.raise_signal(number)))
            train(RECIPE, tmp_path / str(step))
        assert stop.value.number == number and (tmp_path / str(step) / CHECKPOINT).exists()
        train(RECIPE, tmp_path / str(step))
        check_same(tmp_path / str(step), whole)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_second_ctrl_c_does_not_wait(whole: Path, tmp_path: Path):
    ended = []

    def twice(self: Trainer, batch: Batch) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        ended.append(batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", twice)
        train(RECIPE, tmp_path)
    assert not ended and not (tmp_path / CHECKPOINT).exists()
    train(RECIPE, tmp_path)
    check_same(tmp_path, whole)


# A full disk


@contextmanager
def full(room: int) -> Any:
    """No file may become longer than that: what a process finds on a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("owner", "name", "call", "file"),
    [
        (Trainer, "save", 4, CHECKPOINT),
        (Trainer, "save", STEPS + 1, CHECKPOINT),
        (Trainer, "export", 1, ""),
        (trainer, "write_text", 1, SUMMARY),
        (PreTrainedTokenizerFast, "save_pretrained", 1, ""),
    ],
)
def test_a_full_disk_is_told_and_loses_nothing(
    owner: Any, name: str, call: int, file: str, whole: Path, tmp_path: Path
):
    run, calls = getattr(owner, name), count(1)

    def limited(*arguments: Any) -> None:
        room: AbstractContextManager[None] = full(300) if next(calls) == call else nullcontext()
        with room:
            run(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as refused:
        patch.setattr(owner, name, limited)
        train(RECIPE, tmp_path, save_every=0)
    assert str(refused.value).startswith(f"cannot write {tmp_path / file}: ") and "\n" not in str(refused.value)
    assert "File too large" in str(refused.value)
    assert not list(tmp_path.glob("*.new")) and not (tmp_path / SUMMARY).exists()
    assert (tmp_path / CHECKPOINT).exists() == (owner is not PreTrainedTokenizerFast)
    train(RECIPE, tmp_path)
    check_same(tmp_path, whole)


# What is damaged


def without(name: str) -> Callable[[Any], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_(name: str, value: object) -> Callable[[Any], Any]:
    return lambda state: {**state, name: value}


def counter(name: str, value: object) -> Callable[[Any], Any]:
    return lambda state: {**state, "counters": {**state["counters"], name: value}}


def another_models(part: str) -> Callable[[Any], Any]:
    def change(state: Any) -> Any:
        model = replace(RECIPE, hidden=32).build(RECIPE.tokenizer())
        if part == "model":
            return {**state, "model": model.state_dict()}
        for optimizer in state["optimizers"]:
            for kept in optimizer["state"].values():
                kept.update({name: torch.zeros(3, 5) for name, value in kept.items() if value.ndim})
        return state

    return change


def forgotten(state: Any) -> Any:
    return {**state, "optimizers": [{**saved, "state": {}} for saved in state["optimizers"]]}


CONTENTS: dict[str, Callable[[Any], Any]] = {
    "a list": lambda state: [state],
    "a tensor": lambda state: torch.zeros(3),
    "nothing": lambda state: {},
    **{f"without {name}": without(name) for name in ("config", "model", "optimizers", "counters")},
    "config of text": with_("config", "fp32"),
    "no config": with_("config", None),
    "no model": with_("model", {}),
    "model of text": with_("model", "tiny"),
    "another model": another_models("model"),
    "optimisers of another model": another_models("optimizers"),
    "one optimiser": lambda state: {**state, "optimizers": state["optimizers"][:1]},
    "optimisers that forgot": forgotten,
    "optimisers of numbers": with_("optimizers", [1, 2]),
    "counters in a list": with_("counters", [1, 2, 3]),
    "tokens in text": counter("tokens", "3000"),
    "half a batch": counter("index", 1.5),
    "no hash": counter("data_hash", None),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    **{f"cut at {share:%}": lambda content, share=share: content[: int(share * len(content))] for share in
       (0.001, 0.1, 0.5, 0.9, 0.99, 0.9999)},
    "without its last byte": lambda content: content[:-1],
    "random bytes": lambda content: random.Random(0).randbytes(len(content)),
    "random bytes behind the first thousand": lambda content: content[:1000] + random.Random(0).randbytes(50_000),
    "one bit of a weight": lambda content: flipped(content),
    "text": lambda content: b"nonsense",
    "a pickle of code": lambda content: b"cos\nsystem\n(S'exit 3'\ntR.",
}  # fmt: skip


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [*CONTENTS, *BYTES])
def test_a_damaged_checkpoint_is_refused(damage: str, stopped: Path, tmp_path: Path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    file = folder / CHECKPOINT
    if damage in BYTES:
        file.write_bytes(BYTES[damage](file.read_bytes()))
    else:
        torch.save(CONTENTS[damage](torch.load(file, weights_only=True)), file)
    content = file.read_bytes()
    with pytest.raises(UserError) as refused:
        train(RECIPE, folder)
    assert str(refused.value) == f"cannot read {file}: it is damaged, or no checkpoint"
    assert file.read_bytes() == content and not (folder / SUMMARY).exists()


@pytest.mark.parametrize("content", ["", '{"version"', "[]", '{"model": {"type": "BPE"}}', None])
def test_a_checkpoint_beside_a_damaged_tokenizer_is_refused(content: str | None, stopped: Path, tmp_path: Path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    if content is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="has no usable tokenizer") as refused:
        train(RECIPE, folder)
    assert "\n" not in str(refused.value) and (folder / CHECKPOINT).exists()


def test_a_checkpoint_beside_another_tokenizer_is_refused(stopped: Path, tmp_path: Path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        train(RECIPE, folder)


def test_a_run_that_goes_on_leaves_its_tokenizer_alone(
    stopped: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kill while it is written would tear what the checkpoint needs."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *_: pytest.fail("written again"))
    train(RECIPE, folder)
    check_same(folder, whole)


def test_settings_that_only_the_checkpoint_has_are_named(stopped: Path, tmp_path: Path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    torch.save(with_("config", {**state["config"], "ramp": 0.2})(state), folder / CHECKPOINT)
    with pytest.raises(UserError, match=r"made with another ramp$"):
        train(RECIPE, folder)


# A run that is complete


def test_a_complete_run_is_not_made_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trained again"))
    summary = train(RECIPE, folder)
    assert summary == json.loads((whole / SUMMARY).read_text())
    assert capsys.readouterr().err == f"{folder} has the model already: it is not trained again\n"
    check_same(folder, whole)
    with pytest.raises(UserError, match="made with another lr, seed"):
        train(replace(RECIPE, lr=1e-4, seed=1), folder)
    with pytest.raises(UserError, match=r"training\.json exists"):
        train(RECIPE, folder, resume=False)
    for content in ("", "[]", "{}", '{"config": 1}', '{"tokens": 3'):
        (folder / SUMMARY).write_text(content)
        with pytest.raises(UserError, match=r"training\.json"):
            train(RECIPE, folder)
