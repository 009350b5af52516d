"""Mirror-SD: the target's tokens, with the drafter in this process and in another one, which ends with it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hasten import LLM, SamplingParams, UserError
from hasten.bench import tune as tuning
from hasten.bench.prompts import BenchPrompt
from hasten.engine import Draft, Engine, Target
from hasten.methods.systems import executors, mirror
from hasten.methods.systems.mirror import Mirror, MirrorParameters
from hasten.model import OracleModel
from helpers import VOCABULARY, make_model, make_tokenizer, same

PROMPTS = [[number * 13 % 140 + 2 for number in range(1, length)] for length in (2, 40, 7, 23)]
INLINE, PROCESS = "mirror-sd:executor=inline,confidence=0", "mirror-sd:executor=process,confidence=0"
KINDS = [{}, {"temperature": 0.9, "seed": 5}]

processes = pytest.mark.skipif(sys.platform == "win32", reason="needs a socket for another process")


@pytest.fixture(scope="module")
def sure(tmp_path_factory) -> LLM:
    """A target whose last layer adds nothing: what its middle layer says is what it says."""
    folder = tmp_path_factory.mktemp("sure") / "tiny"
    for name, noise in (("tiny", 0.0), ("tiny-draft", 0.05)):
        model = make_model(noise)
        if name == "tiny":
            with torch.no_grad():
                model.model.layers[1].self_attn.o_proj.weight.zero_()
                model.model.layers[1].mlp.down_proj.weight.zero_()
        model.save_pretrained(folder.with_name(name))
        make_tokenizer().save_pretrained(folder.with_name(name))
    return LLM(folder, dtype="float32")


def fresh(llm: LLM) -> Engine:
    return Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder))


@pytest.mark.parametrize("kind", KINDS, ids=["greedy", "sampled"])
def test_every_verdict_is_foreseen_where_the_middle_layer_knows(sure, kind):
    """One candidate per row is enough then, with the target's own noise, too."""
    engine, asked = fresh(sure), SamplingParams(max_tokens=24, ignore_eos=True, **kind)
    expected = sure.generate(PROMPTS, asked, "plain")
    requests = [engine.add(prompt, asked, f"{INLINE},width=1")[0] for prompt in PROMPTS]
    list(engine.run())
    assert [request.output for request in requests] == [each.token_ids for each in expected]
    clock = engine.drafter(f"{INLINE},width=1")[1].clock
    assert clock.hits == clock.windows > 20


def test_misses_where_it_does_not(llm):
    engine, asked = fresh(llm), SamplingParams(max_tokens=24, ignore_eos=True)
    for prompt in PROMPTS:
        engine.add(prompt, asked, f"{INLINE},width=1")
    list(engine.run())
    clock = engine.drafter(f"{INLINE},width=1")[1].clock
    assert 0 < clock.hits < clock.windows and clock.fallback > 0
    assert 0 < clock.law <= clock.step


@pytest.mark.parametrize("kind", KINDS, ids=["greedy", "sampled"])
def test_one_trace_tells_the_hits_of_every_width(llm, kind):
    """A narrower drafter's candidates are the first of a wider one's, and its windows are the same: a hit's is what
    the drafter says anew."""
    engine, asked = fresh(llm), SamplingParams(max_tokens=24, ignore_eos=True, **kind)
    clocks = {}
    for width in (1, 2, 4, 8):
        spec = f"{INLINE},width={width}"
        for prompt in PROMPTS:
            engine.add(prompt, asked, spec)
            list(engine.run())
        clocks[width] = engine.drafter(spec)[1].clock
    widest = clocks[8]
    for width, clock in clocks.items():
        assert clock.windows == widest.windows > 10
        assert clock.hits == sum(clock.places.values()) == round(widest.hit_rate(width) * widest.windows)
    rates = [widest.hit_rate(width) for width in range(9)]
    assert rates == sorted(rates) and rates[0] == 0 < rates[8]


@pytest.mark.parametrize("kind", KINDS, ids=["greedy", "sampled"])
def test_candidates_leave_out_what_stands_there(llm, kind):
    """Behind a row that the window goes on from, its next token can be no end of it; behind the last one all can."""
    request = fresh(llm).add(PROMPTS[1], SamplingParams(**kind))[0]
    logits = 3 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(2))
    at, sampler = len(PROMPTS[1]), request.sampler
    likely = sampler.choose(logits, range(at, at + 3), [[], [0], [0, 0]])
    draft = Draft.chain([likely[0], (likely[1] + 1) % VOCABULARY])
    rows = Mirror.candidates(request, draft, logits, 4)
    assert likely[0] not in rows[0] and rows[1][0] == likely[1] and rows[2][0] == likely[2]
    for number, (row, drafted) in enumerate(zip(rows, [*draft.tokens, None], strict=True)):
        scores = logits[number].clone()
        if kind:
            noise = torch.tensor(sampler.noise(at + number, range(VOCABULARY)))
            scores = scores / kind["temperature"] + noise
        order = [token for token in scores.argsort(descending=True).tolist() if token != drafted]
        assert row == order[:4]


def test_many_requests_share_the_width(llm):
    """Paper's schedule: 64 candidates per row in all."""
    engine, widths = fresh(llm), []
    spec = f"{INLINE},width=16,length=1"
    drafter = engine.drafter(spec)[1]
    branch = drafter.executor.rollouts.branch

    def note(messages):
        widths.append((len(messages), max(len(row) for _, rows in messages for row in rows)))
        branch(messages)

    drafter.executor.rollouts.branch = note
    for number in range(12):
        engine.add(PROMPTS[number % 4], SamplingParams(max_tokens=4 + number, ignore_eos=True), spec)
    list(engine.run())
    assert all(width <= max(1, 64 // count) for count, width in widths)
    assert max(width for _, width in widths) == 16


@processes
@pytest.mark.parametrize("kind", KINDS, ids=["greedy", "sampled"])
def test_another_process_gives_the_same_tokens(llm, kind):
    asked = SamplingParams(max_tokens=24, logprobs=2, **kind)
    expected = llm.generate(PROMPTS, asked, "plain")
    for mine, theirs in zip(llm.generate(PROMPTS, asked, PROCESS), expected, strict=True):
        same(mine.choices[0], theirs.choices[0])
    assert sum(each.choices[0].statistics.accepted for each in llm.generate(PROMPTS, asked, PROCESS)) > 5
    drafter = llm.engine.drafter(PROCESS)[1]
    assert drafter.memory_bytes > 0 and drafter.weights == {} and drafter.clock.steps > 5


@processes
def test_its_process_ends_with_it(llm):
    engine = fresh(llm)
    drafter = engine.drafter(PROCESS)[1]
    drafter.prepare()
    worker = _child(drafter)
    assert _alive(worker)
    del drafter, engine
    gc.collect()
    assert _ends(worker)


@processes
def test_a_search_for_a_method_leaves_no_process(llm, monkeypatch):
    """Nor do candidates that it has given up: all processes but one end before the last prompts."""
    started, alive = [], []
    start, check = executors.Process.start, tuning._Search.check

    def note(self):
        start(self)
        started.append(self.pid)

    def look(self, prompts):
        alive.append(sum(map(_alive, set(started))))
        check(self, prompts)

    monkeypatch.setattr(executors.Process, "start", note)
    monkeypatch.setattr(tuning._Search, "check", look)
    prompts = [BenchPrompt("words", "words", f"the cat and the moon {number}", None) for number in range(8)]
    specs = [f"{PROCESS},length={length}" for length in (2, 4)]
    result = tuning.tune(llm, prompts, SamplingParams(max_tokens=6, ignore_eos=True), 100.0, specs)
    assert len(set(started)) == 2 and alive == [1]
    assert {candidate.method for candidate in result.candidates} == set(specs)
    assert all(map(_ends, set(started)))


def test_where_no_core_is_spare_nothing_is_started(llm, monkeypatch):
    for spare, kind in ((0, executors.Inline), (1, executors.Process if mirror.CAN_START else executors.Inline)):
        monkeypatch.setattr(mirror, "spare_cores", lambda spare=spare: spare)
        assert type(fresh(llm).drafter("mirror-sd")[1].executor) is kind


@processes
def test_a_process_that_was_killed_is_told_and_started_anew(llm):
    engine, asked = fresh(llm), SamplingParams(max_tokens=12, ignore_eos=True)
    request = engine.add(PROMPTS[1], asked, PROCESS)[0]
    engine.step()
    os.kill(_child(engine.drafter(PROCESS)[1]), signal.SIGKILL)
    while engine.busy:
        engine.step()
    assert isinstance(request.error, UserError) and "process has ended" in str(request.error)
    again = engine.add(PROMPTS[1], asked, PROCESS)[0]
    list(engine.run())
    assert again.output == llm.generate([PROMPTS[1]], asked, "plain")[0].token_ids


@processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_its_process_ends_however_this_one_does(tiny, number):
    program = (
        "import sys; from pathlib import Path\n"
        "from hasten.methods.drafters.small_model import SmallCheckpoint\n"
        "from hasten.methods.systems.executors import Process, Setup\n"
        f"checkpoint = SmallCheckpoint(Path({f'{tiny}-draft'!r}), 'float32', 'cpu', 'auto')\n"
        "process = Process(Setup(checkpoint, Path(), frozenset(), 4, 0.0, 2, (0,), False))\n"
        "process.start()\n"
        "print(process.pid, flush=True)\n"
        "sys.stdin.read(1)\n"
    )
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        assert _alive(worker)
        owner.send_signal(number)
    assert _ends(worker)


@processes
def test_a_model_that_cannot_be_loaded(llm, tiny, tmp_path):
    folder = shutil.copytree(f"{tiny}-draft", tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="safetensors"):
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2), f"mirror-sd:executor=process,model={folder}")


def test_what_it_refuses(llm, tiny, monkeypatch):
    with pytest.raises(UserError, match="needs a transformer of two layers or more"):
        Mirror(Target(OracleModel(lambda history: None, 5)), MirrorParameters())
    with pytest.raises(UserError, match="layer must be below 2"):
        llm.engine.drafter("mirror-sd:layer=2")
    with pytest.raises(UserError, match="mirror-sd cannot be a part of a composition"):
        llm.engine.drafter("ngram+mirror-sd")
    for wrong in ("length=0", "width=17", "confidence=2", "executor=gpu", "cores=0", "layer=-1"):
        with pytest.raises(UserError, match=f"mirror-sd: {wrong.partition('=')[0]} must"):
            llm.engine.drafter(f"mirror-sd:{wrong}")


def _child(drafter: Mirror) -> int:
    assert isinstance(drafter.executor, executors.Process)
    return drafter.executor.pid


def _alive(worker: int) -> bool:
    try:
        os.kill(worker, 0)
    except ProcessLookupError:
        return False
    # Nobody may have waited for it yet.
    return "Z" not in Path(f"/proc/{worker}/stat").read_text().split() if sys.platform == "linux" else True


def _ends(worker: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not _alive(worker):
            return True
        time.sleep(0.02)
    return False
