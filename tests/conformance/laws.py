"""Random languages small enough to know every probability, ways to decode them, and a test of what came out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from hasten import SamplingParams
from hasten.engine import Draft, Drafter, Engine, Limits, Target
from hasten.engine.drafting.verification import reject
from hasten.engine.sampling.noise import Uniforms
from hasten.methods.drafters.draft_model import DraftModel, DraftModelParameters
from hasten.model import OracleModel

PROMPT = (0, 1)
KEPT = 3
"""How many tokens' joint law is tested."""


class Law:
    """A random second-order language over `size` tokens."""

    def __init__(self, seed: int, size: int = 5, spread: float = 1.2) -> None:
        rng = np.random.default_rng(seed)
        self.size = size
        self.logits = torch.tensor(spread * rng.normal(size=(size, size, size)), dtype=torch.float32)

    def __call__(self, history: tuple[int, ...]) -> Tensor:
        return self.logits[history[-2], history[-1]]

    def table(self, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Float64 [size, size, size]: the distribution after each pair of tokens."""
        scores = self.logits.double() / temperature
        if top_k:
            floor = scores.topk(top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < floor, -torch.inf)
        return scores.softmax(-1)


def joint(table: Tensor, skipped: int = 0) -> np.ndarray:
    """Exact law of `KEPT` tokens after the prompt and `skipped` tokens more, [size] * KEPT."""
    p = table.numpy()
    pairs = np.zeros(p.shape[:2])
    pairs[PROMPT] = 1
    for _ in range(skipped):
        pairs = np.einsum("xy,xyz->yz", pairs, p)
    return np.einsum("xy,xya,yab,abc->abc", pairs, p, p, p)


def check_law(groups: list[np.ndarray], exact: np.ndarray) -> list[float]:
    """Chi-square of each group of samples [count, KEPT], and of all together; returns the p-values.

    Under the exact law p-values are uniform: few are small, none is tiny.
    """
    values = [_p_value(group, exact) for group in groups]
    together = _p_value(np.concatenate(groups), exact)
    assert min(values) > 1e-4, values
    assert np.mean(np.array(values) < 0.05) <= 0.25, values
    assert together > 1e-3, together
    return values


def _p_value(samples: np.ndarray, exact: np.ndarray) -> float:
    """Chi-square with cells merged until each expects five."""
    cells = np.ravel_multi_index(tuple(samples.T), exact.shape)
    observed = np.bincount(cells, minlength=exact.size).astype(float)
    expected = exact.ravel() * len(samples)
    # What cannot happen never does.
    assert observed[expected == 0].sum() == 0
    order = np.argsort(expected)
    merged: list[list[float]] = [[0.0, 0.0]]
    for cell in order:
        merged[-1][0] += observed[cell]
        merged[-1][1] += expected[cell]
        if merged[-1][1] >= 5:
            merged.append([0.0, 0.0])
    tail = merged.pop()
    merged[-1][0] += tail[0]
    merged[-1][1] += tail[1]
    counts, wanted = np.array(merged).T
    return float(chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue)


class OracleDraftModel(DraftModel):
    """The real draft-model method with a language in the small model's place."""

    def __init__(self, target: Target, parameters: DraftModelParameters, law: Law) -> None:
        self.law = law
        super().__init__(target, parameters)

    def _load(self, target: Target, parameters: DraftModelParameters) -> OracleModel:
        return OracleModel(self.law, self.law.size)


def draft_model(law: Law, **parameters) -> Callable[[Engine], Drafter]:
    """From an engine to its drafter."""
    return lambda engine: OracleDraftModel(engine.target, DraftModelParameters(**parameters), law)


Propose = Callable[[tuple[int, ...], Uniforms], Draft]


def by_rejection(table: Tensor, propose: Propose, seed: int) -> list[int]:
    """`KEPT` tokens by the bare rule: propose, reject, until there are enough."""
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + KEPT:
        draft = propose(tuple(tokens), Uniforms(seed, 1, len(tokens)))
        context = tuple(tokens)

        def target(node: int, draft: Draft = draft, context: tuple[int, ...] = context) -> Tensor:
            whole = context + tuple(draft.tokens[step] for step in draft.path(node))
            return table[whole[-2], whole[-1]]

        verdict = reject(draft, target, Uniforms(seed, 2, len(tokens)))
        tokens += [*(draft.tokens[node] for node in verdict.path), verdict.token]
    return tokens[len(PROMPT) : len(PROMPT) + KEPT]


def by_engine(
    law: Law, method: str | Drafter | Callable[[Engine], Drafter], groups: int, count: int, **settings
) -> tuple[list[np.ndarray], Engine, int]:
    """Groups of `count` choices decoded by the whole engine, the first of the tokens left out; the engine; accepted.

    The first token comes with the prompt, before any draft.
    """
    engine = Engine(OracleModel(law, law.size), limits=Limits(sequences=count))
    if callable(method):
        method = method(engine)
    samples, accepted = [], 0
    for seed in range(groups):
        params = SamplingParams(max_tokens=KEPT + 2, n=count, seed=seed, **{"temperature": 1.0, **settings})
        requests = engine.add(PROMPT, params, method)
        for _ in engine.run():
            pass
        samples.append(np.array([request.output[1 : 1 + KEPT] for request in requests]))
        accepted += sum(request.statistics.accepted for request in requests)
    assert engine.cache.used_bytes == 0
    return samples, engine, accepted
