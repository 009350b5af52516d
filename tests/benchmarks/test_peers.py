"""The comparison with other engines, `benchmarks/peers`, with workers that only pretend: no peer is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import catalogue
import environments
import limits
import measure
import numpy as np
import process
import prompts
import pytest
import reference
import show
import torch
from catalogue import HASTEN, PEERS, PRECISIONS, STORED, Peer
from environments import Unavailable
from gguf_files import byte_level, write_model
from measure import Plan
from process import Process
from results import PLAIN, Reading, Results, Visit, Way, agreement, widest_gap
from workers.protocol import Settings

from hasten import LLM
from hasten.engine import registry
from hasten.errors import UserError
from helpers import make_model, make_tokenizer

PEERS_FOLDER = environments.HERE
FAKE = '''
"""A worker that continues every prompt by its first token, and fails in as many ways as it has methods."""

import os
import time

import numpy as np

from workers.protocol import Answer


class Fake:
    def __init__(self, settings):
        if settings.precision == "int4":
            raise ValueError("four bits\\nare not enough")
        if settings.precision == "int8":
            print("loading", flush=True)
            os._exit(7)
        if settings.precision == "bfloat16":
            time.sleep(60)

    def begin(self, speculation):
        pass

    def run(self, prompts, max_tokens, speculation):
        print("libraries print")
        if speculation == "raises":
            raise RuntimeError("cannot do that")
        if speculation == "dies":
            os._exit(3)
        if speculation == "half":
            os.write(3, b'{"tokens": [[')  # the channel is the first descriptor behind the standard ones
            os._exit(4)
        if speculation == "hangs":
            os.system("sleep 60")
        length = max_tokens - (speculation == "short")
        wrong = speculation == "wrong"
        return Answer([[prompt[0] + wrong] * length for prompt in prompts], 0.5 * len(prompts), 0.1, 0.25)

    def logits(self, prompt):
        if 100 in prompt:
            return None
        if 101 in prompt:
            return np.array(prompt) % 16
        if 102 in prompt:
            return np.zeros((1, 16))
        return 2.0 * np.eye(16)[np.array(prompt) % 16]


def load(settings):
    return Fake(settings)


def convert(source, target, precision):
    if precision == "int4":
        raise ValueError("no such weights")
    if precision == "int8":
        os.system("sleep 60")
    (target / "weights").write_text(f"{source.name} {precision}")
'''
METHODS = ("right", "raises", "dies", "short", "wrong")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer of this interpreter, whose worker is the one above."""
    workers = tmp_path / "code" / "workers"
    workers.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "protocol.py"):
        shutil.copy(PEERS_FOLDER / "workers" / name, workers)
    (workers / "fake.py").write_text(FAKE)
    monkeypatch.setattr(process, "HERE", workers.parent)
    monkeypatch.setattr(environments, "HERE", workers.parent)
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return Peer("fake", worker="fake", package="pytest", installs=(), precisions=PRECISIONS, methods=METHODS)


def settings(precision: str = "float32") -> Settings:
    return Settings("model", precision, threads=1, context=64, longest=128, batch=2)


def visit(number: int, speed: float, **changes: Any) -> Visit:
    return Visit(**{"round": number, "prompts": 2, "tokens": 20, "seconds": 20 / speed} | FURTHER | changes)


FURTHER = {"prefill_seconds": None, "overhead": None, "prefix": 1.0, "same": 1.0, "gap": None}


# The catalogue


def test_the_catalogue_is_consistent():
    assert next(iter(PEERS)) == HASTEN
    for name, peer in PEERS.items():
        assert peer.name == name
        assert peer.precisions and set(peer.precisions) <= set(PRECISIONS)
        assert peer.batching in ("continuous", "static", "in step")
        assert PLAIN not in peer.methods and len(set(peer.methods)) == len(peer.methods)
        worker = (PEERS_FOLDER / "workers" / f"{peer.worker}.py").read_text()
        assert "\ndef load(settings: Settings) -> Worker:" in worker
        assert peer.converts == bool(re.search(r"^def convert\(|import .*\bconvert\b", worker, re.MULTILINE))


def test_peers_that_share_an_environment_install_the_same():
    for peer in PEERS.values():
        assert PEERS[peer.folder].installs == peer.installs


def test_hasten_runs_where_the_comparison_runs_and_offers_methods_that_exist():
    assert environments.interpreter(PEERS[HASTEN]) == Path(sys.executable)
    assert {part for method in PEERS[HASTEN].methods for part in method.split("+")} <= set(registry.methods())


@pytest.mark.parametrize("draft", [None, Path("small")])
def test_whatever_drafts_with_a_smaller_model_needs_one(tmp_path: Path, draft: Path | None):
    asked = plan(tmp_path, peers=[HASTEN], draft=draft)
    drafting = {way.method for way in asked.ways("float32", 1) if "draft-model" in way.method}
    assert drafting == (set() if draft is None else {"draft-model", "copyspec+draft-model"})


def test_everything_that_is_installed_is_pinned():
    for peer in PEERS.values():
        for call in peer.installs:
            lines = (
                (PEERS_FOLDER / call[1]).read_text().splitlines()
                if call[0] == "-r"
                else [word for word in call if not word.startswith("-") and word != peer.package]
            )
            for line in lines:
                assert re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line), (peer.name, line)


def test_nothing_may_choose_another_build_of_torch():
    """Whatever asks for torch comes after the pinned one, and no list names it or its sisters again."""
    for peer in PEERS.values():
        words = [word for call in peer.installs for word in call]
        assert not any(re.match(r"torch(vision|audio|codec)\b", word) for word in words)
        if any(word.startswith(("transformers", "vllm", "optimum")) for word in words):
            assert peer.installs[0] == (catalogue.TORCH,)
    assert not re.search(r"^torch", (PEERS_FOLDER / "requirements/vllm.txt").read_text(), re.MULTILINE)


def test_pip_is_kept_from_another_torch_also_where_it_builds(
    fake: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncat $PIP_CONSTRAINT $PIP_BUILD_CONSTRAINT\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(environments, "HERE", PEERS_FOLDER)
    monkeypatch.setattr(environments.sys, "executable", str(python))
    peer = Peer("x", worker="fake", package="pytest", installs=(("nothing==1",),), precisions=PRECISIONS)
    with pytest.raises(Unavailable):
        environments.install(peer, lambda text: None)
    log = (environments.base() / "x" / "install.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("#")] == [catalogue.TORCH] * 2


def test_a_changed_recipe_is_installed_anew(fake: Peer, tmp_path: Path):
    peer = Peer("x", worker="fake", package="pytest", installs=(("pytest==1",),), precisions=PRECISIONS)
    marker = environments.base() / "x" / environments.MARKER
    assert not environments.installed(peer)
    marker.parent.mkdir(parents=True)
    marker.write_text(environments._recipe(peer))
    assert environments.installed(peer)
    changed = Peer("x", worker="fake", package="pytest", installs=(("pytest==2",),), precisions=PRECISIONS)
    assert not environments.installed(changed)


def test_an_installation_that_fails_says_why(fake: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Collecting nothing'\necho 'ERROR: no such package'\necho later\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(environments.sys, "executable", str(python))
    peer = Peer("x", worker="fake", package="pytest", installs=(("nothing==1",),), precisions=PRECISIONS)
    with pytest.raises(Unavailable, match="installation failed: ERROR: no such package"):
        environments.install(peer, lambda text: None)
    python.write_text("#!/bin/sh\necho 'Successfully installed some'\nkill -15 $$\n")
    with pytest.raises(Unavailable, match="installation failed: signal 15 ended it"):
        environments.install(peer, lambda text: None)
    assert not environments.installed(peer)


# Parent and worker


def test_a_worker_answers_sleeps_and_ends(fake: Peer, tmp_path: Path):
    log = tmp_path / "log"
    worker = Process(fake, settings(), log, timeout=30)
    assert state(worker) == "T"
    with worker.awake():
        worker.begin("right")
        answer = worker.run([[5, 6], [7]], 3, "right")
    assert answer.tokens == [[5, 5, 5], [7, 7, 7]]
    assert (answer.seconds, answer.prefill_seconds, answer.overhead) == (1.0, 0.1, 0.25)
    assert state(worker) == "T" and not worker.ended
    worker.close()
    assert worker.ended and "libraries print" in log.read_text()


def state(worker: Process) -> str:
    """Of the process, as Linux says it, once a signal has arrived."""
    file = Path(f"/proc/{worker._process.pid}/stat")
    for _ in range(100):
        letter = file.read_text().rpartition(")")[2].split()[0]
        if letter == "T":
            break
        time.sleep(0.01)
    return letter


@pytest.mark.parametrize(
    ("method", "reason", "ends"),
    [
        ("raises", "RuntimeError: cannot do that", False),
        ("dies", "its process ended with status 3", True),
        ("half", "its process ended with status 4", True),
        ("hangs", "no answer within 0.5 s", True),
        ("short", "gave 2 tokens where 3 were asked for", False),
    ],
)
def test_a_worker_that_fails_says_how(fake: Peer, tmp_path: Path, method: str, reason: str, ends: bool):
    worker = Process(fake, settings(), tmp_path / "log", timeout=30)
    worker._timeout = 0.5 if method == "hangs" else 30
    with worker.awake(), pytest.raises(Unavailable, match=reason):
        worker.run([[5]], 3, method)
    assert worker.ended == ends
    worker.close()


def test_a_worker_that_was_killed_in_its_sleep(fake: Peer, tmp_path: Path):
    worker = Process(fake, settings(), tmp_path / "log", timeout=30)
    os.kill(worker._process.pid, signal.SIGKILL)
    with worker.awake(), pytest.raises(Unavailable, match="its process ended with status -9"):
        worker.run([[5]], 3, "right")
    assert worker.ended


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("int4", "ValueError: four bits are not enough"),
        ("int8", "its process ended with status 7"),
        ("bfloat16", "no answer within 1 s"),
    ],
)
def test_loading_that_fails_says_how(fake: Peer, tmp_path: Path, precision: str, reason: str):
    with pytest.raises(Unavailable, match=reason):
        Process(fake, settings(precision), tmp_path / "log", timeout=1 if precision == "bfloat16" else 30)


def test_a_limit_ends_what_was_started_and_its_children(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took longer than 0.2 s"):
        # The shell ends at once; the child holds its output open.
        limits.output(["sh", "-c", "sleep 60 & exit 0"], 0.2)
    assert time.monotonic() - started < 30
    assert limits.output(["sh", "-c", "echo done"], 30) == "done\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As much of one as a digest reads."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_checkpoint_is_converted_once_per_content_and_precision(fake: Peer, checkpoint: Path, tmp_path: Path):
    said: list[str] = []
    peer = Peer("fake", worker="fake", package="pytest", installs=(), precisions=PRECISIONS, converts=True)

    def convert(precision: str) -> Path:
        return environments.converted(peer, checkpoint, precision, tmp_path / "log", 30, said.append)

    first = convert("float32")
    assert (first / "weights").read_text() == "checkpoint float32"
    assert convert("float32") == first and len(said) == 1
    assert convert("bfloat16") != first
    (checkpoint / "model.safetensors").write_bytes(b"others")
    assert convert("float32") != first and len(said) == 3


def test_a_conversion_that_fails_leaves_nothing(fake: Peer, checkpoint: Path, tmp_path: Path):
    peer = Peer("fake", worker="fake", package="pytest", installs=(), precisions=PRECISIONS, converts=True)
    for precision, timeout, reason in (("int4", 30.0, "no such weights"), ("int8", 0.5, "took longer than 0.5 s")):
        with pytest.raises(Unavailable, match=reason):
            environments.converted(peer, checkpoint, precision, tmp_path / "log", timeout, lambda text: None)
    assert list((environments.base() / "converted").glob("*/*")) == []


# The comparison


def plan(tmp_path: Path, **changes: Any) -> Plan:
    (tmp_path / "logs").mkdir(exist_ok=True)
    given = {
        "checkpoint": tmp_path,
        "draft": None,
        "prompts": [[5, 6], [7], [8, 9, 10]],
        "lengths": [],
        "predictions": 0,
        "max_tokens": 4,
        "peers": [HASTEN, "fake"],
        "precisions": ["float32"],
        "batches": [1, 2],
        "batch_count": None,
        "speculation": True,
        "rounds": 2,
        "threads": 1,
        "timeout": 60.0,
        "logs": tmp_path / "logs",
    }
    return Plan(**given | changes)


@pytest.fixture
def comparison(fake: Peer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Peer]:
    """A catalogue of two that pretend: hasten, which only decodes plainly, and the one that fails in many ways."""
    own = Peer(HASTEN, worker="fake", package="pytest", installs=(), precisions=PRECISIONS)
    peers = {HASTEN: own, "fake": fake}
    monkeypatch.setattr(measure, "PEERS", peers)
    monkeypatch.setattr(reference, "PEERS", peers)
    return peers


def results(file: Path | None = None, **changes: Any) -> Results:
    made = Results(file, {"checkpoint": "x", "threads": 1} | changes)
    made.reference = made.reference or [[5] * 4, [7] * 4, [8] * 4]
    made.gaps = made.gaps or [[2.0] * 4, [0.5] * 4, [1.0] * 4]
    return made


def test_what_fails_is_a_row_with_its_reason_and_the_others_go_on(comparison: dict[str, Peer], tmp_path: Path):
    found = results()
    measure.measure(plan(tmp_path), found, lambda text: None)
    for batch in (1, 2):
        for peer, method in ((HASTEN, PLAIN), ("fake", PLAIN), ("fake", "right"), ("fake", "wrong")):
            assert sorted(found.visits[Way(peer, "float32", batch, method)]) == [0, 1]
        reasons = {way.method: reason for way, reason in found.unavailable.items() if way.batch == batch}
        assert reasons == {
            "raises": "RuntimeError: cannot do that",
            "dies": "its process ended with status 3",
            "short": "gave 3 tokens where 4 were asked for",
        }
    right, wrong = (found.visits[Way("fake", "float32", 1, method)][0] for method in ("right", "wrong"))
    assert (right.prompts, right.tokens, right.seconds, right.prefix, right.same) == (3, 12, 1.5, 1.0, 1.0)
    assert right.prefill_seconds == pytest.approx(0.3) and right.overhead == 0.25
    assert (wrong.prefix, wrong.same, wrong.gap) == (0.0, 0.0, 2.0)
    assert right.gap is None
    # Of three prompts, one full batch of two.
    assert found.visits[Way("fake", "float32", 2, "right")][0].prompts == 2


def test_batches_are_full_and_no_more_than_asked_for(tmp_path: Path):
    assert plan(tmp_path).groups(1) == [[[5, 6]], [[7]], [[8, 9, 10]]]
    assert plan(tmp_path).groups(2) == [[[5, 6], [7]]]
    assert plan(tmp_path, batch_count=2).groups(1) == [[[5, 6]], [[7]]]


def test_a_peer_that_does_not_load_is_asked_once(comparison: dict[str, Peer], tmp_path: Path):
    found = results()
    said: list[str] = []
    asked = plan(tmp_path, precisions=["int4"], batches=[1], peers=["fake"], rounds=1)
    measure.measure(asked, found, said.append)
    assert not found.visits
    assert {way.method for way in found.unavailable} == {PLAIN, *METHODS}
    assert set(found.unavailable.values()) == {"ValueError: four bits are not enough"}
    assert said.count("fake: loading int4") == 1


def test_a_peer_without_environment_is_a_row(
    comparison: dict[str, Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def install(peer: Peer, say: Any) -> None:
        if peer.name == "fake":
            raise Unavailable("installation failed: no compiler")

    monkeypatch.setattr(measure, "install", install)
    found = results()
    measure.measure(plan(tmp_path, speculation=False, batches=[1], rounds=1), found, lambda text: None)
    assert found.unavailable == {Way("fake", "float32", 1, PLAIN): "installation failed: no compiler"}
    assert list(found.visits) == [Way(HASTEN, "float32", 1, PLAIN)]


def test_a_drafter_that_cannot_be_converted_is_the_only_thing_missing(
    comparison: dict[str, Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    comparison["fake"] = Peer(
        "fake", worker="fake", package="pytest", installs=(), precisions=PRECISIONS, methods=("draft-model",)
    )

    def convert(peer: Peer, folder: Path, *rest: Any) -> Path:
        if folder.name == "small":
            raise Unavailable("conversion failed: too small")
        return folder

    monkeypatch.setattr(measure, "converted", convert)
    found = results()
    measure.measure(plan(tmp_path, draft=tmp_path / "small", rounds=1), found, lambda text: None)
    assert found.unavailable == {
        Way("fake", "float32", batch, "draft-model"): "conversion failed: too small" for batch in (1, 2)
    }
    assert Way("fake", "float32", 2, PLAIN) in found.visits


def test_the_same_command_goes_on_where_an_interrupted_one_stopped(comparison: dict[str, Peer], tmp_path: Path):
    file = tmp_path / "results.json"
    first = results(file)
    visits = 0

    def interrupt(text: str) -> None:
        nonlocal visits
        visits += "round" in text
        if visits == 4:
            raise KeyboardInterrupt

    asked = plan(tmp_path, batches=[1], speculation=False)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(asked, first, interrupt)
    assert sum(map(len, first.visits.values())) == 3
    second = results(file)
    assert second.visits == first.visits and second.reference == first.reference
    said: list[str] = []
    measure.measure(asked, second, said.append)
    assert sum("round" in text for text in said) == 1
    assert [sorted(rounds) for rounds in second.visits.values()] == [[0, 1], [0, 1]]
    assert results(file).visits == second.visits


def test_what_failed_is_kept_and_tried_again_where_it_is_asked_for(comparison: dict[str, Peer], tmp_path: Path):
    file = tmp_path / "results.json"
    first = results(file)
    working, failing, other = (Way(*way, "float32", 1, method) for way, method in FAILURES)
    first.unavailable = {working: "no disk", failing: "no disk", other: "no compiler"}
    first.save()
    second = results(file)
    assert second.unavailable == first.unavailable
    measure.measure(plan(tmp_path, batches=[1], rounds=1, peers=["fake"]), second, lambda text: None)
    assert working in second.visits and working not in second.unavailable
    assert second.unavailable[failing] == "RuntimeError: cannot do that"
    assert second.unavailable[other] == "no compiler"


FAILURES = ((("fake",), "right"), (("fake",), "raises"), (("absent",), PLAIN))


def test_the_reference_that_fails_ends_the_run_with_a_sentence(comparison: dict[str, Peer], fake: Peer, tmp_path: Path):
    comparison["transformers"] = fake
    empty = Results(None, {})
    measure.measure(plan(tmp_path, speculation=False, rounds=1, batches=[1]), empty, lambda text: None)
    assert empty.reference == [[5] * 4, [7] * 4, [8] * 4]
    assert empty.gaps == [[2.0] * 4] * 3
    comparison["transformers"] = Peer("transformers", worker="nothing", package="", installs=(), precisions=())
    with pytest.raises(UserError, match="transformers gives no reference: ModuleNotFoundError"):
        measure.measure(plan(tmp_path), Results(None, {}), lambda text: None)


def test_another_peer_begins_each_round(comparison: dict[str, Peer], tmp_path: Path):
    said: list[str] = []
    measure.measure(plan(tmp_path, batches=[1], speculation=False), results(), said.append)
    turns = [text.rpartition(": ")[2].split()[0] for text in said if "round" in text]
    assert turns == [HASTEN, "fake", "fake", HASTEN]


def test_predictions_are_compared_once_per_peer_and_precision(comparison: dict[str, Peer], tmp_path: Path):
    comparison["transformers"] = comparison[HASTEN]
    asked = plan(tmp_path, batches=[1], rounds=1, speculation=False, predictions=4)
    found = results(tmp_path / "results.json")
    measure.measure(asked, found, lambda text: None)
    # All three prompts have six tokens: the first of each fits.
    assert found.divergences == {(peer, "float32"): {"rows": 3, "kl": 0.0, "top1": 1.0} for peer in (HASTEN, "fake")}
    assert [(row["kl"], row["top1"]) for row in found.rows()] == [(0.0, 1.0)] * 2
    said: list[str] = []
    measure.measure(asked, results(tmp_path / "results.json"), said.append)
    assert not any("predictions" in text for text in said)


@pytest.mark.parametrize(
    ("token", "expected"), [(100, None), (101, {"rows": 2, "kl": None, "top1": 1.0}), (102, "gave 1 predictions for 2")]
)
def test_peers_tell_as_much_of_their_predictions_as_they_can(
    comparison: dict[str, Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: int, expected: Any
):
    monkeypatch.setattr(measure.Reference, "logits", lambda self, prompt: torch.eye(16)[torch.tensor(prompt) % 16])
    asked = plan(
        tmp_path, peers=["fake"], prompts=[[5, token]], batches=[1], rounds=1, speculation=False, predictions=9
    )
    found = results()
    measure.measure(asked, found, lambda text: None)
    if isinstance(expected, str):
        assert expected in found.unavailable[Way("fake", "float32", 1, "predictions")]
    else:
        assert found.divergences.get(("fake", "float32")) == expected and not found.unavailable


def test_first_tokens_are_waited_for_in_rounds(comparison: dict[str, Peer], tmp_path: Path):
    file = tmp_path / "results.json"
    asked = plan(tmp_path, batches=[1], speculation=False, lengths=[300, 600])
    found, said = results(file), []
    measure.measure(asked, found, said.append)
    entries = found.first_tokens()
    assert [(entry["peer"], entry["length"], entry["rounds"]) for entry in entries] == [
        (HASTEN, 300, 2), ("fake", 300, 2), (HASTEN, 600, 2), ("fake", 600, 2),
    ]  # fmt: skip
    assert all(entry["ms"] == 500 for entry in entries)
    assert [entry["tokens_per_second"] for entry in entries] == [600, 600, 1200, 1200]
    assert [entry["ratio"] for entry in entries] == [1.0, None, 1.0, None]
    turns = [text.rpartition(": ")[2] for text in said if "prompt of 300" in text]
    assert turns == [HASTEN, "fake", "fake", HASTEN]
    assert results(file).readings == found.readings
    said = []
    measure.measure(asked, results(file), said.append)
    assert not any("prompt of" in text for text in said)


def test_prompts_of_a_length_and_beginnings_of_many():
    given = [[1, 2], [3], [4, 5, 6]]
    assert prompts.of_length(given, 4, 0) == [1, 2, 3, 4]
    assert prompts.of_length(given, 8, 4) == [3, 4, 5, 6, 1, 2, 3, 4]
    assert prompts.beginnings(given, 7) == prompts.beginnings(given, 6) == given
    assert prompts.beginnings(given, 5) == [[1, 2], [3], [4, 5]]
    assert prompts.beginnings(given, 4) == [[1], [3], [4]]
    assert prompts.beginnings(given, 1) == [[1]]


def test_a_gguf_file_is_for_those_that_read_it(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    asked = plan(tmp_path, checkpoint=file, peers=list(PEERS), precisions=[STORED], speculation=False)
    assert [way.peer for way in asked.ways(STORED, 1)] == [HASTEN, "llama.cpp"]
    reasons = {way.peer: reason for way, reason in asked.idle().items()}
    assert set(reasons) == set(PEERS) - {HASTEN, "llama.cpp"}
    assert reasons["vllm"] == "it reads no GGUF files"
    assert reasons["transformers"] == "of this checkpoint only float32, bfloat16"
    # A folder has no weights that are stored in few bits.
    assert plan(tmp_path, peers=list(PEERS), precisions=[STORED]).ways(STORED, 1) == []
    digest = environments.digest(file)
    assert environments.converted(PEERS["llama.cpp"], file, STORED, tmp_path / "log", 1, print) == file
    file.write_bytes(b"GGUF2")
    assert environments.digest(file) != digest


def test_the_idle_are_listed_and_not_installed(
    comparison: dict[str, Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    installed: list[str] = []
    monkeypatch.setattr(measure, "install", lambda peer, say: installed.append(peer.name))
    file = tmp_path / "model.gguf"
    file.touch()
    comparison[HASTEN] = replace(comparison[HASTEN], gguf=("float32",))
    found = results()
    measure.measure(plan(tmp_path, checkpoint=file, batches=[1], rounds=1), found, lambda text: None)
    assert installed == [HASTEN] and list(found.visits) == [Way(HASTEN, "float32", 1, PLAIN)]
    assert found.unavailable == {Way("fake", "float32", 1, PLAIN): "it reads no GGUF files"}


# Results


def test_the_widest_gap_where_answers_first_differ():
    gaps = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    reference = [[1, 2, 3], [1, 2, 3]]
    assert widest_gap([[1, 9, 9], [1, 2, 3]], reference, gaps) == 2.0
    assert widest_gap([[1, 2, 9], [9, 2, 3]], reference, gaps) == 4.0
    assert widest_gap([[1, 2, 3]], reference, gaps) is None


def test_agreement_by_hand():
    prefix, same = agreement([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 0, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert prefix == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert same == pytest.approx((3 / 4 + 3 / 4 + 1) / 3)


def test_speeds_by_hand():
    assert visit(0, 40.0).speed == pytest.approx(40.0)
    assert visit(0, 40.0).decode_speed is None
    # 18 of 20 tokens come in the 0.4 s behind the prompts of two sequences.
    assert visit(0, 40.0, prefill_seconds=0.1).decode_speed == pytest.approx(45.0)
    assert visit(0, 40.0, prefill_seconds=0.1, tokens=2).decode_speed is None


def test_medians_and_ratios_by_hand():
    found = results()
    own, guess = Way(HASTEN, "int8", 4, PLAIN), Way(HASTEN, "int8", 4, "ngram")
    slow, fast, lookup = Way("a", "int8", 4, PLAIN), Way("b", "int8", 4, PLAIN), Way("a", "int8", 4, "lookup")
    for way, speeds in {
        own: [100, 60, 120],
        guess: [150, 90, 60],
        slow: [10, 20, 30],
        fast: [50, 60, 40],
        lookup: [70, 80, 75],
    }.items():
        for number, speed in enumerate(speeds):
            found.add(way, visit(number, speed, overhead=speed / 1000))
    rows = {Way(*(row[key] for key in ("peer", "precision", "batch", "method"))): row for row in found.rows()}
    row = rows[own]
    assert (row["rounds"], row["tokens_per_second"], row["slowest"], row["fastest"]) == (3, 100.0, 60.0, 120.0)
    assert row["overhead"] == 0.1 and row["decode_tokens_per_second"] is None
    plain, best = found.ratios()
    # Rounds are paired: 100/50, 60/60, 120/40, whose median is 2, where the medians' ratio is 100/50 by chance;
    # then own plain (100) against lookup (75): 100/70, 60/80, 120/75.
    assert (plain["kind"], plain["peer"], plain["ratio"]) == ("plain", "b", 2.0)
    assert (best["kind"], best["hasten"], best["peer"], best["method"]) == ("best", PLAIN, "a", "lookup")
    assert best["ratio"] == pytest.approx(100 / 70, abs=1e-3)


def test_ratios_need_rounds_that_both_have():
    found = results()
    found.add(Way(HASTEN, "int8", 1, PLAIN), visit(0, 10))
    assert found.ratios() == []
    found.add(Way("a", "int8", 1, PLAIN), visit(1, 10))
    assert found.ratios() == []
    found.add(Way("a", "int8", 1, PLAIN), visit(0, 5))
    assert [ratio["ratio"] for ratio in found.ratios()] == [2.0, 2.0]


def test_results_of_other_settings_or_no_results_are_refused(tmp_path: Path):
    file = tmp_path / "results.json"
    first = results(file)
    first.add(Way(HASTEN, "int8", 1, PLAIN), visit(0, 10))
    first.save()
    (tmp_path / "results.json.new").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*results\.json: Is a directory"):
        first.save()
    with pytest.raises(UserError, match="measured with another threads: choose another folder"):
        results(file, threads=2)
    for text in ("{", "{}", json.dumps(first.document() | {"visits": [{"way": {}, "visit": {}}]})):
        file.write_text(text)
        with pytest.raises(UserError, match="is no result of this comparison"):
            results(file)


@pytest.fixture
def document() -> dict[str, Any]:
    found = results()
    for number in range(2):
        found.add(Way(HASTEN, "int8", 1, PLAIN), visit(number, 2000 + number, prefix=0.5, gap=0.25))
        found.add(Way(HASTEN, "int8", 1, "ngram"), visit(number, 4000))
        found.add(Way("openvino", "int8", 1, PLAIN), visit(number, 1000, prefill_seconds=0.001))
        found.add(Way("openvino", "bfloat16", 16, PLAIN), visit(number, 500))
    found.divergences[HASTEN, "int8"] = {"rows": 100, "kl": 0.0017, "top1": 0.975}
    for peer, length, taken in ((HASTEN, 50, 0.01), ("openvino", 50, 0.02), ("openvino", 4000, 1.0)):
        found.seconds(Reading(peer, "int8", length)).update({0: taken, 1: taken})
    for batch in (1, 16):
        found.unavailable[Way("vllm", "int8", batch, PLAIN)] = "its process ended with status -9"
    return found.document()


def test_the_table(document: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    show.results(document)
    lines = [re.sub(" +", " ", line.strip()) for line in capsys.readouterr().out.splitlines()]
    block = lines[lines.index("int8, batch 1") :]
    assert block[1].startswith("peer method tokens/s KL top-1 slowest fastest")
    # The fastest first.
    assert block[2] == "hasten ngram 4,000 0.0017 97.5% 4,000 4,000 - - 100% 100% -"
    assert block[3] == "hasten plain 2,000 0.0017 97.5% 2,000 2,001 - - 50% 100% 0.25"
    first = lines[lines.index("int8, until the first token of a prompt read alone") :]
    assert first[1:4] == [
        "peer 50: ms tokens/s ratio 4,000: ms tokens/s ratio",
        "hasten 10.0 5,000 2.00 - - -",
        "openvino 20.0 2,500 - 1,000.0 4,000 -",
    ]
    assert block[4].startswith("openvino plain 1,000")
    assert "both plain: hasten plain / openvino plain: 2.00" in block
    assert "best of all: hasten ngram / openvino plain: 4.00" in block
    assert "bfloat16, batch 16" in lines
    assert "vllm (int8; plain; batch 1, 16) not available: its process ended with status -9" in lines


def test_the_picture(document: dict[str, Any], tmp_path: Path):
    from plot import draw

    draw(document, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    # Letters are paths; matplotlib leaves what they say as comments.
    for label in ("int8, batch 1", "bfloat16, batch 16", "hasten", "openvino", "ngram"):
        assert f"<!-- {label} -->" in text


# The command


@pytest.fixture
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_command", PEERS_FOLDER / "__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return int(command.main())
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peers", "hasten,nobody"], "unknown peer 'nobody'"),
        (["--precisions", "int3"], "unknown precision 'int3'"),
        (["--batches", "one"], "batches must be numbers"),
        (["--rounds", "0"], "must be at least 1"),
        (["--batch-count", "0"], "must be at least 1"),
        (["--timeout", "0"], "timeout must be above 0"),
        (["--prompt-count", "2"], "prompt-count must be at least the largest batch, 16"),
        (["--prompts", ","], "at least one suite or file"),
        (["--batches", ","], "at least one batch size"),
        (["--first-token", "0"], "must be at least 1"),
        (["--first-token", "many"], "first-token must be numbers"),
        (["--predictions", "-1"], "predictions must not be below 0"),
        (["--threads", "4096"], "4096 threads need as many processors"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_one_sentence(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], sentence: str,
):  # fmt: skip
    assert run(command, monkeypatch, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_list_and_install(command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def install(peer: Peer, say: Any) -> None:
        if peer.name == "vllm":
            raise Unavailable("installation failed: no room")

    monkeypatch.setattr(command, "install", install)
    monkeypatch.setattr(command, "version", lambda peer: "1.0")
    assert run(command, monkeypatch, "--list", "--json") == 0
    assert [row["peer"] for row in json.loads(capsys.readouterr().out)] == list(PEERS)
    assert run(command, monkeypatch, "--install", "--peers", "hasten,vllm,openvino") == 1
    assert capsys.readouterr().out.splitlines() == [
        "hasten: 1.0",
        "vllm: installation failed: no room",
        "openvino: 1.0",
    ]


def test_the_whole_command(
    command: ModuleType, comparison: dict[str, Peer], fake: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    comparison["transformers"] = fake
    monkeypatch.setattr(command, "PEERS", comparison)
    arguments = ["--peers", "hasten,fake", "--precisions", "float32", "--batches", "1,2", "--prompt-count", "4"]
    arguments += ["--max-tokens", "4", "--threads", "1", "--rounds", "1", "--out", str(tmp_path / "out"), "--json"]
    arguments += ["--first-token", "30", "--predictions", "50"]
    assert run(command, monkeypatch, *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / command.RESULTS).read_text())
    assert len(document["rows"]) == 4 and len(document["ratios"]) == 4
    assert len(document["first_tokens"]) == len(document["divergences"]) == 2
    assert all(row["same_share"] == 1.0 for row in document["rows"])
    assert (tmp_path / "out" / command.PLOT).exists()
    assert {file.name for file in (tmp_path / "out/logs").iterdir()} >= {"reference.log", "fake-float32.log"}


def test_prompts_are_taken_in_turns_and_evenly():
    from hasten.bench.suite import load_suite
    from hasten.model.checkpoint import resolve
    from hasten.model.tokenizer import load_tokenizer

    checkpoint = resolve("tiny")
    taken = prompts.encode(checkpoint, 2048, "agent,tasks", 5, 16, chat=False)
    tokenizer = load_tokenizer(checkpoint)
    suites = [{tuple(tokenizer(item.prompt)["input_ids"]) for item in load_suite(name)} for name in ("agent", "tasks")]
    assert [[tuple(ids) in suite for suite in suites].index(True) for ids in taken] == [0, 1, 0, 1, 0]
    assert len(set(map(tuple, taken))) == 5


def test_of_conversations_the_first_turns_are_taken_through_the_template(tiny: Path, llm: LLM, tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"turns": ["the cat", "and the moon"]}\n{"prompt": "the moon"}\n')

    def said(text: str) -> list[int]:
        return llm.apply_chat_template([{"role": "user", "content": text}])

    assert prompts.encode(tiny, 128, str(file), 2, 16, chat=False) == [said("the cat"), llm.encode("the moon")]
    assert prompts.encode(tiny, 128, str(file), 2, 16, chat=True) == [said("the cat"), said("the moon")]
    with pytest.raises(UserError, match="0 prompts that fit the context; 2 are needed"):
        prompts.encode(tiny, 17, str(file), 2, 16, chat=True)


def test_a_picture_that_cannot_be_drawn_is_said_before_anything_is_measured(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(command, "measure", lambda *given: pytest.fail("it measured"))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run(command, monkeypatch, "--threads", "1", "--out", str(tmp_path / "out")) == 2
    assert "needs matplotlib: pip install 'hasten[plots]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(command, "measure", lambda *given: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    assert run(command, monkeypatch, "--threads", "1", "--out", str(tmp_path / "file")) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_draft_is_of_the_checkpoints_kind(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "draft.gguf").write_bytes(b"GGUF")
    assert run(command, monkeypatch, "--threads", "1", "--draft", str(tmp_path / "draft.gguf")) == 2
    assert "both be folders, or both GGUF files" in capsys.readouterr().err


def test_prompts_longer_than_the_context_are_left_out_aloud(command: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert command._fitting([50, 4000], 2048) == [50]
    assert capsys.readouterr().err == "prompts of 4000 tokens do not fit the context of 2048: left out\n"


def test_a_gguf_file_is_measured_as_it_is_stored(command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    keys = byte_level(make_tokenizer(), "gpt-2")
    file = write_model(tmp_path / "tiny.gguf", make_model(), tokenizer=keys)
    (tmp_path / "prompts.txt").write_text("the cat\nthe moon\n")
    planned: list[Plan] = []
    monkeypatch.setattr(command, "measure", lambda plan, results, say: planned.append(plan))
    arguments = ["--checkpoint", str(file), "--prompts", str(tmp_path / "prompts.txt"), "--prompt-count", "2"]
    assert run(command, monkeypatch, *arguments, "--batches", "1", "--threads", "1", "--max-tokens", "4") == 0
    [asked] = planned
    assert asked.precisions == [STORED] and asked.lengths == [50]
    from workers import hasten, transformers

    worker = hasten.load(asked.settings(asked.checkpoint, None, STORED))
    worker.begin(None)
    reference = transformers.load(asked.settings(asked.checkpoint, None, "float32"))
    assert np.allclose(worker.logits(asked.prompts[0]), reference.logits(asked.prompts[0]), atol=1e-3)
    [tokens] = worker.run(asked.prompts[:1], 4, None).tokens
    assert worker.logits([*asked.prompts[0], *tokens])[-5:-1].argmax(1).tolist() == tokens


def test_a_gguf_file_that_the_reference_cannot_read_is_said_before_anything_is_measured(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = write_model(tmp_path / "tiny.gguf", make_model(), tokenizer=byte_level(make_tokenizer(), "gpt-2"))
    monkeypatch.setattr(command, "measure", lambda *given: pytest.fail("it measured"))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run(command, monkeypatch, "--threads", "1", "--checkpoint", str(file)) == 2
    assert "pip install accelerate" in capsys.readouterr().err


def test_the_command_explains_itself(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="0"):
        run(command, monkeypatch, "--help")
    printed = capsys.readouterr().out
    for option in ("--install", "--timeout", "--speculation", "--out"):
        assert option in printed
