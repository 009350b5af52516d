"""What deciding on a draft takes for a while: measured by each acceptance rule, against what was said before."""

from __future__ import annotations

import pytest
import torch

from hasten import SamplingParams
from hasten.engine import Draft, Drawn, Engine
from hasten.engine.decoding import Answer
from hasten.engine.sampling.sampler import likeliest_if_finite
from hasten.model import OracleModel
from helpers import PeakBytes

SIZE, LEVELS = 4000, 5
OTHERS = [
    {},
    {"top_k": 20},
    {"top_k": 2000, "top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"logit_bias": {3: 1.0}},
    {"logprobs": 5},
]


def sampled_tree(levels: int, sparse: bool) -> Draft:
    """A chain of likely tokens with siblings on each level, which come first: they are rejected before."""
    draft, node = Draft(), -1
    for level in range(levels):
        q = torch.rand(SIZE, generator=torch.Generator().manual_seed(level), dtype=torch.float64)
        draft.drawn[node] = Drawn(q / q.sum(), torch.arange(SIZE).flip(0) if sparse else None, replacement=False)
        siblings = [100 * level + 40, 100 * level + 41] if levels > 1 else []
        draft.tokens += [*siblings, level]
        draft.parents += [node] * (len(siblings) + 1)
        node = len(draft) - 1
    return draft


def measured(draft: Draft, **settings) -> tuple[int, int, int]:
    """Bytes at most, what was said, and the tokens that were accepted, in sum over some seeds.

    The last node and those above it are likely.
    """
    most = said = accepted = 0
    for seed in range(6):
        engine = Engine(OracleModel(lambda history: torch.zeros(SIZE), SIZE))
        params = SamplingParams(**{"max_tokens": 50, "temperature": 1.0, "seed": seed, **settings})
        (request,) = engine.add([2, 3], params)
        rows = len(draft) + 1
        logits = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))
        for node in draft.path(len(draft) - 1):
            logits[draft.parents[node] + 1, draft.tokens[node]] = 14.0
        request.decoding.draft = draft
        answer = Answer(logits, *likeliest_if_finite(logits), None, rows)
        with torch.inference_mode(), PeakBytes() as peak:
            tokens = request.decoding.receive(request, answer)
            request.decoding.keep(request, tokens)
        most, said = max(most, peak.most), max(said, request.sampler.scratch_bytes(rows))
        accepted += len(tokens) - 1
    return most, said, accepted


@pytest.mark.parametrize("others", OTHERS, ids=str)
@pytest.mark.parametrize("acceptance", ["match", "max", "typical"])
def test_what_deciding_takes_for_a_while(acceptance, others):
    chain = Draft.chain(range(LEVELS))
    most, said, accepted = measured(chain, acceptance=acceptance, **others)
    assert accepted and most <= said
    # What `max` takes for sampled nodes is said, and this draft has none.
    assert acceptance == "max" or said < 2.2 * most


@pytest.mark.parametrize("others", OTHERS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("levels", [0, 1, LEVELS])
def test_what_rejection_takes_for_a_while(levels, sparse, others):
    most, said, accepted = measured(sampled_tree(levels, sparse), acceptance="max", **others)
    assert most <= said and (accepted or not levels)
    if levels == 1:
        # Of more rows, choosing without sampled nodes takes more.
        assert said < 2.2 * most
