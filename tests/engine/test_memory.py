"""Sizes as people write them, and the ledger of steps."""

from __future__ import annotations

import pytest

from hasten import SamplingParams, UserError
from hasten.engine import Draft, Drafter, Engine
from hasten.engine.memory import Footprint, Ledger, logits_bytes, mask_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("64MiB", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("2kb", 2000), (" 3 KiB ", 3072), (".5MB", 500_000)],
)
def test_sizes(text, count):
    assert parse_bytes(text, "it") == count


@pytest.mark.parametrize("text", ["", "many", "5 parsecs", "-3MB", "0", "0.2", "1e3MB", "MiB"])
def test_what_is_not_a_size(text):
    with pytest.raises(UserError, match="it must be"):
        parse_bytes(text, "it")


def test_the_peak_is_of_one_step_not_of_several():
    ledger = Ledger()
    ledger.record(Footprint(kv=10, logits=1))
    ledger.record(Footprint(kv=2, logits=5, masks=1, drafter=1))
    assert ledger.most == Footprint(10, 5, 1, 1)
    assert ledger.peak == 11 and ledger.last.total == 9


class Fan(Drafter):
    """As many children of the root as told."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def propose(self, request, budget):
        return Draft(list(range(self.nodes)), [-1] * self.nodes)


@pytest.mark.parametrize("nodes", [2, 5, 16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_engine_enters_what_it_holds(llm, nodes, batch):
    engine = Engine(llm.model, llm.tokenizer)
    drafter = Fan(nodes)
    for _ in range(batch):
        engine.add([2, 3, 4], SamplingParams(max_tokens=8, ignore_eos=True), drafter)
    list(engine.run())
    vocabulary = llm.model.config.vocab_size
    assert engine.ledger.most.logits == batch * logits_bytes(nodes + 1, vocabulary)
    assert engine.ledger.most.masks == batch * mask_bytes(nodes)
    assert engine.ledger.most.kv == engine.cache.peak_bytes
