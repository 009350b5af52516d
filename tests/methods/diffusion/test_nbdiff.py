"""NBDiff: blocks behind a causal context, and the same blocks as drafts that plain decoding verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from canvases import MASK, PROMPTS, VOCABULARY, by_position, canvas_of, decode, oracle, run
from torch import Tensor

from hasten.engine import Engine, SamplingParams
from hasten.errors import UserError

NAME = "context-causal-shifted"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "max": {"temperature": 1.0, "seed": 1, "acceptance": "max"},
    "penalties": {"temperature": 0.8, "top_k": 6, "seed": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["confidence=0", "passes=3,threshold=0.2,confidence=0"])
def test_drafts_leave_the_text_plain_decodings(kind: str, options: str, models: Callable[..., Any]) -> None:
    for model in (oracle(NAME), models(NAME).model):
        jobs = [(prompt, SamplingParams(max_tokens=5 + 3 * n, **KINDS[kind])) for n, prompt in enumerate(PROMPTS)]
        plain = run(Engine(model), *[(*job, "plain") for job in jobs])
        drafted = run(Engine(model), *[(*job, f"nbdiff-draft:{options}") for job in jobs])
        assert [request.output for request in drafted] == [request.output for request in plain]
        assert sum(request.statistics.proposed for request in drafted) > 20


def test_right_drafts_give_a_block_per_step() -> None:
    """A law that says the same whatever it sees: the last token's row and three masks give four tokens."""
    law = by_position({place: place % 7 for place in range(40)}, {})
    request = decode(oracle(NAME, law), "nbdiff-draft:confidence=0", PROMPTS[2], max_tokens=13)
    assert request.output == [place % 7 for place in range(4, 17)]
    assert request.statistics.accepted_per_step == [0, 3, 3, 3]


def test_a_draft_ends_before_what_is_unsure() -> None:
    law = by_position({}, dict.fromkeys(range(40), 9.0) | {place: 0.1 for place in range(7, 40, 3)})
    request = decode(oracle(NAME, law), "nbdiff-draft", PROMPTS[2], max_tokens=10)
    assert request.output == [0] * 10
    # Behind the token at 4 stand 5 and 6, and 7 is unsure; behind the one at 7 stand 8 and 9; and so on.
    assert request.statistics.accepted_per_step == [0, 2, 2, 2]


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_one_token_per_pass_is_denoising_in_that_order(rule: str) -> None:
    """No probability is above a threshold of 1."""
    for prompt in PROMPTS:
        ours, static = (
            canvas_of(decode(oracle(NAME), spec, prompt, max_tokens=9))
            for spec in (f"nbdiff:rule={rule},threshold=1", f"denoise:order={rule}")
        )
        assert ours.ids.tolist() == static.ids.tolist()
        assert ours.committed_at.tolist() == static.committed_at.tolist()


def test_all_above_the_threshold_at_once() -> None:
    """Strictly above it, and the surest in any case."""
    law = by_position({}, {5: 9.0, 6: 1.0, 7: 9.0})
    request = decode(oracle(NAME, law), "nbdiff:threshold=0.9", PROMPTS[2], max_tokens=4)
    # Position 4 comes with the pass over the prompt.
    assert canvas_of(request).committed_at[4:].tolist() == [1, 2, 3, 2]


@pytest.mark.parametrize("spec", ["nbdiff", "nbdiff-draft"])
def test_refusals(spec: str) -> None:
    for name in ("block-causal-shifted", "context-causal-same"):
        with pytest.raises(UserError, match=f"{spec} needs a model that fills masks behind.*hasten train nbdiff"):
            Engine(oracle(name)).drafter(spec)


def test_masks_without_finite_logits() -> None:
    def law(seen: Sequence[tuple[int, int]], position: int) -> Tensor:
        return torch.full((VOCABULARY,), torch.nan if any(token == MASK for _, token in seen) else 0.0)

    with pytest.raises(UserError, match="the model's logits are not finite"):
        decode(oracle(NAME, law), "nbdiff-draft", PROMPTS[2], max_tokens=10)
