"""The exactness check: does a method give the tokens of plain decoding, on every prompt, greedy and sampling?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hasten.bench.lane import engine_for, reference
from hasten.engine import Engine, SamplingParams
from hasten.llm import LLM
from hasten.model import Rows

BATCH = 8


@dataclass(frozen=True)
class VerifyResult:
    """`identical` counts prompts whose tokens were the same in every mode and batch size."""

    method: str
    prompts: int
    identical: int
    first_divergence: dict[str, Any] | None
    modes: dict[str, int]
    accepted: int
    proposed: int

    def document(self) -> dict[str, Any]:
        """The document of `hasten verify --json`."""
        return self.__dict__.copy()


def modes_of(max_tokens: int, seed: int) -> dict[str, SamplingParams]:
    """The parameter sets checked: greedy, plain sampling, filtered and penalised sampling."""
    sampled = SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=seed)
    return {
        "greedy": SamplingParams(max_tokens=max_tokens),
        "sampling": sampled,
        "filtered": replace(sampled, temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1),
    }


def verify(
    llm: LLM,
    method: str,
    prompts: Sequence[str | Sequence[int]],
    max_tokens: int = 64,
    seed: int = 1,
    report: Callable[[int], None] = lambda done: None,
) -> VerifyResult:
    """Decode every prompt plainly, with the method alone, and with the method in mixed batches of eight.

    Plainly is one token per pass, by the method's reference.

    Args:
        prompts: texts or token ids.
        report: called with the number of prompts done in a mode, for progress bars.

    Raises:
        UserError: unknown method, a prompt that is too long.
    """
    plain, fast = engine_for(llm), engine_for(llm)
    yardstick = reference(fast, method)
    ids = [llm.encode(prompt) for prompt in prompts]
    same = [True] * len(ids)
    modes: dict[str, int] = {}
    divergence: dict[str, Any] | None = None
    accepted = proposed = 0
    for mode, params in modes_of(max_tokens, seed).items():
        right = 0
        for start in range(0, len(ids), BATCH):
            group = ids[start : start + BATCH]
            expected = [_decode(plain, [prompt], params, [yardstick])[0] for prompt in group]
            # Alone, and beside plain requests in one batch: neither may change a token.
            alone = [_decode(fast, [prompt], params, [method])[0] for prompt in group]
            mixed = [yardstick if index % 4 == 3 else method for index in range(len(group))]
            together = _decode(fast, group, params, mixed)
            for offset, plainly in enumerate(expected):
                ok = True
                for batch, output in ((1, alone[offset]), (len(group), together[offset])):
                    accepted, proposed = accepted + output[1], proposed + output[2]
                    if output[0] != plainly[0]:
                        ok = False
                        if divergence is None:
                            where = {"prompt": start + offset, "mode": mode, "batch": batch}
                            divergence = where | _divergence(llm, group[offset], plainly[0], output[0])
                right += ok
                same[start + offset] &= ok
            report(len(group))
        modes[mode] = right
    return VerifyResult(method, len(ids), sum(same), divergence, modes, accepted, proposed)


def _decode(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, methods: Sequence[str]
) -> list[tuple[list[int], int, int]]:
    """Tokens, accepted and proposed counts of each prompt, decoded in one batch."""
    requests = [engine.add(prompt, params, method)[0] for prompt, method in zip(prompts, methods, strict=True)]
    for _ in engine.run():
        pass
    return [(request.output, request.statistics.accepted, request.statistics.proposed) for request in requests]


def _divergence(llm: LLM, prompt: list[int], expected: list[int], got: list[int]) -> dict[str, Any]:
    """Where two outputs part, and how close the model's two likeliest tokens are there (in logits).

    The latter is None for models whose prediction depends on what else of a canvas was decided.
    """
    shared = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    return {
        "position": shared,
        "expected": expected[shared] if shared < len(expected) else None,
        "got": got[shared] if shared < len(got) else None,
        "top2_gap": None if llm.model.config.fills_canvas else _gap(llm, [*prompt, *expected[:shared]]),
    }


@torch.inference_mode()
def _gap(llm: LLM, context: list[int]) -> float:
    """How much larger the largest logit of the next token is than the second."""
    sequence = llm.engine.cache.sequence()
    logits = llm.model.forward(Rows.of(sequence, context, 0, llm.model.device), [len(context) - 1])
    sequence.release()
    if llm.model.config.diffusion is not None:
        logits[:, llm.model.config.diffusion.mask_id] = -torch.inf
    top = logits[0].topk(2).values.tolist()
    return float(top[0] - top[1])
