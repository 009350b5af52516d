"""Predictions beside a reference's: the sums by hand, rows in passes, and a model whose weights are rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hasten import LLM, UserError
from hasten.bench import divergence
from hasten.bench.divergence import Divergence, examine, passes, rounded
from hasten.model.native.library import LIBRARY

PROMPTS = [[1, 5, 9, 33, 96, 7, 7], [1, 2], [1], [1, 50, 40, 30, 20, 10]]
NATIVE = pytest.mark.skipif(not LIBRARY.exists(), reason="the native step was not built: no C++ compiler")


def test_divergence_by_hand():
    half = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    found = Divergence()
    # Logits are known up to a constant per row.
    found.add(half + 3, other - 2)
    assert (found.rows, found.agreeing) == (2, 1)
    # 0.5 log(0.5 / 0.25) + 0.25 log(0.25 / 0.5)
    assert found.nats == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    found.add(half, half)
    assert found.document() == {"rows": 4, "kl": pytest.approx(0.0433217, abs=1e-6), "top1": 0.75}


def test_what_is_impossible_to_the_reference_weighs_nothing():
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    found = Divergence()
    found.add(reference, torch.tensor([[1.0, 1.0, 1.0]]))
    assert found.nats == pytest.approx(torch.log(torch.tensor(1.5)).item(), abs=1e-6)
    found.add(reference, reference)
    assert found.document()["kl"] == pytest.approx(found.nats / 2, abs=1e-6)


def test_of_likeliest_tokens_only_the_agreement_is_known():
    found = Divergence()
    found.add(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    assert found.document() == {"rows": 2, "kl": None, "top1": 0.5}


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_passes_cover_all_rows_in_order(most: int):
    lengths = [5, 1, 3, 2]
    found = list(passes(lengths, most))
    assert all(sum(stop - start for _, start, stop in batch) == most for batch in found[:-1])
    rows = [(number, row) for batch in found for number, start, stop in batch for row in range(start, stop)]
    assert rows == [(number, row) for number, length in enumerate(lengths) for row in range(length)]
    assert list(passes([], 4)) == []


@pytest.mark.parametrize("rows", [3, 128])
def test_a_model_agrees_with_itself_in_pieces_and_gives_its_memory_back(
    llm: LLM, tiny: Path, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(divergence, "ROWS", rows)
    reference = LLM(tiny, dtype="float32", backend="torch")
    before = [each.engine.cache.used_bytes for each in (llm, reference)]
    seen: list[int] = []
    found = divergence.divergence(llm, reference, PROMPTS, seen.append)
    assert found.rows == found.agreeing == sum(seen) == 16 and max(seen) <= rows
    assert found.nats == pytest.approx(0.0, abs=1e-8)
    assert [each.engine.cache.used_bytes for each in (llm, reference)] == before


def test_an_interruption_gives_memory_back(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "ROWS", 3)
    before = llm.engine.cache.used_bytes

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        divergence.divergence(llm, llm, PROMPTS, stop)
    assert llm.engine.cache.used_bytes == before


@NATIVE
def test_coarser_weights_are_farther_away(tiny: Path):
    reference = LLM(tiny, dtype="float32", backend="torch")
    loaded = {weights: LLM(tiny, dtype="bfloat16", weights=weights) for weights in ("dense", "int8", "int4")}
    assert [rounded(each.model) for each in loaded.values()] == [False, True, True]
    assert not rounded(reference.model)
    found = {name: divergence.divergence(each, reference, PROMPTS).document()["kl"] for name, each in loaded.items()}
    assert 0 < found["dense"] < found["int4"] and 0 < found["int8"] < found["int4"]


def test_what_the_doctor_says(llm: LLM, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"turns": ["the cat", "and the moon"]}, {"prompt": "the moon and the cat"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    said: list[str] = []
    found = examine(llm, lambda: llm, file, said.append)
    rows = len(llm.apply_chat_template([{"role": "user", "content": "the cat"}])) + len(llm.encode(lines[1]["prompt"]))
    assert found == {"reference": "float32", "prompts": 2, "rows": rows, "kl": 0.0, "top1": 1.0}
    assert said[0] == "loading the model in float32" and said[-1].endswith(f"{rows} of {rows}")
    file.write_text(json.dumps({"prompt": "the moon " * 1000}))
    with pytest.raises(UserError, match=r"a prompt of .* tokens; the model has a context of"):
        examine(llm, lambda: llm, file, said.append)


def test_the_prompts_that_ship_are_of_many_kinds():
    entries = [json.loads(line) for line in divergence.PROMPTS.read_text().splitlines()]
    assert len({entry["category"] for entry in entries}) == len(entries) == 10
    assert all(len(entry["turns"]) == 1 for entry in entries)
