"""The measuring code: lanes, suites, the exactness check's report, the doctor's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import LLM, UserError
from hasten.bench import doctor
from hasten.bench.compare import compare
from hasten.bench.lane import Lane, engine_for, interleave
from hasten.bench.suite import load_prompts, load_suite
from hasten.bench.verify import verify
from hasten.cli.bench import split_methods
from hasten.engine import Draft, Drafter, SamplingParams
from hasten.engine.verification import Verdict
from hasten.tasks import CATEGORIES, TASKS

PROMPT = "Copy the list: red cat moon salt red cat sun\nAnswer:"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", dtype="float32")


def test_lanes_take_turns_by_their_own_clocks(llm: LLM):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    lanes = [Lane(llm, engine_for(llm), "plain", llm.encode(PROMPT), params) for _ in range(2)]
    order = [lane for lane, _ in interleave(lanes)]
    assert order.count(lanes[0]) == order.count(lanes[1]) == 8
    assert lanes[0].tokens == lanes[1].tokens
    assert order[:8] != [lanes[0]] * 8


def test_suites():
    whole = load_suite("tasks", 2)
    assert len(whole) == 2 * len(TASKS) and {item.category for item in whole} == set(CATEGORIES)
    assert [item.prompt for item in whole] == [item.prompt for item in load_suite("tasks", 2)]
    assert {item.task for item in load_suite("copy", 3)} == {"copy"}
    assert all(item.grade is not None for item in whole)


def test_prompt_files(tmp_path: Path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [item.prompt for item in load_prompts(text)] == ["one", "two"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "category": "x"}\n{"prompt": "b"}\n')
    assert [item.category for item in load_prompts(lines)] == ["x", "file"]
    lines.write_text("not json\n")
    with pytest.raises(UserError, match="line 1"):
        load_prompts(lines)


def test_verify_reports_the_first_divergence(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """A verification that accepts whatever is drafted must be caught."""

    def gullible(draft: Draft, chosen: list[int]) -> Verdict:
        return Verdict(list(range(len(draft))), chosen[len(draft)])

    class Wrong(Drafter):
        def propose(self, request, budget):
            return Draft.chain([7])

    monkeypatch.setattr("hasten.engine.verification.match", gullible)
    monkeypatch.setattr("hasten.engine.registry.create", lambda spec, target: Wrong() if spec == "wrong" else plain)
    plain = type("Nothing", (Drafter,), {"propose": lambda self, request, budget: Draft()})()
    result = verify(llm, "wrong", [PROMPT, PROMPT + " red"], max_tokens=6)
    assert result.identical == 0 and result.prompts == 2
    found = result.first_divergence
    assert found is not None and found["prompt"] == 0 and found["mode"] == "greedy"
    assert found["got"] != found["expected"] and found["top2_gap"] >= 0


def test_compare_counts(llm: LLM):
    prompts = load_suite("copy", 2)
    rows = compare(llm, ["ngram"], prompts, SamplingParams(max_tokens=32))
    by_key = {(row["method"], row["category"]): row for row in rows}
    assert by_key["plain", "overall"]["tokens_per_step"] == 1
    assert by_key["plain", "overall"]["speedup"] == 1
    assert by_key["ngram", "overall"]["prompts"] == 2
    assert by_key["ngram", "lists"]["tokens_per_step"] >= 1


def test_method_lists():
    assert split_methods("a, b:x=1,y=2,c") == ["a", "b:x=1,y=2", "c"]
    with pytest.raises(UserError):
        split_methods(" ,")


def test_doctor_measures_every_row_count(llm: LLM):
    costs = doctor.step_costs(llm, rows=(1, 4), context=32, repeats=3)
    assert costs.keys() == {1, 4} and all(seconds > 0 for seconds in costs.values())
    assert llm.engine.cache.used_bytes == 0
    assert isinstance(doctor.row_invariant(llm), bool)
