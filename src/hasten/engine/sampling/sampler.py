"""From logits to tokens: one processed distribution, in float32, for plain decoding, drafting and verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.engine.drafting.draft import ROOT, Draft
from hasten.engine.memory import LOGIT_BYTES
from hasten.engine.sampling.bans import Bans
from hasten.engine.sampling.grammar import GrammarState
from hasten.engine.sampling.noise import Uniforms, gumbel, gumbels, mix
from hasten.engine.sampling.params import SamplingParams
from hasten.engine.sampling.rule import Rule
from hasten.engine.sampling.walk import Walk, descend, scratch_bytes
from hasten.errors import UserError
from hasten.model.decoder import NOT_FINITE

COIN_STREAM = 2
DRAWING, PENALISING, ADJUSTING, ALLOWING, KEYS = 36, 25, 8, 2, 64
"""Bytes per logit that exist at the same time, at most: of noise and what makes it, of penalties, of other changes, of
what a grammar allows. `KEYS` are per row, or per token of which something is reported.
"""
DENSE, REPORTING = 8, 8
"""Bytes per logit of one row's `Distribution.dense`, and of log-probabilities that are reported."""


@dataclass
class Distribution:
    """Processed log-weights of some rows (unnormalised, float32, -inf where filtered out).

    `ids` is int64 [rows, kept] where only some tokens were kept, likeliest first; None means column = token id.
    """

    scores: Tensor
    ids: Tensor | None
    vocabulary: int

    def dense(self, row: int) -> Tensor:
        """Probabilities of one row over the whole vocabulary, float64 on the CPU."""
        probabilities = self.scores[row].double().softmax(-1).cpu()
        if self.ids is None:
            return probabilities
        full = torch.zeros(self.vocabulary, dtype=torch.float64)
        return full.index_add_(0, self.ids[row].cpu(), probabilities)


class Sampler:
    """Sampling of one request's choice.

    Args:
        params: the request's parameters, with a seed.
        choice: which of the n choices this is.
        prompt: token ids, for the repetition penalty.
        vocabulary: size of the logits.
        grammar: masks what the request's constraint forbids.
        bans: of tokens that the request may not choose at some places.

    Raises:
        UserError: logit_bias names a token outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        choice: int,
        prompt: Sequence[int],
        vocabulary: int,
        grammar: GrammarState | None = None,
        bans: Bans | None = None,
    ) -> None:
        outside = next((token for token in params.logit_bias if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise UserError(f"logit_bias: token id {outside} is outside the vocabulary of {vocabulary}")
        self.params, self.choice, self.vocabulary, self.grammar = params, choice, vocabulary, grammar
        self.bans = bans or Bans((), 0, ())
        self.seed = params.seed or 0
        self.rule = Rule(params, choice, prompt, vocabulary)

    @property
    def is_argmax(self) -> bool:
        """Whether the raw argmax is the answer."""
        adjusted = self.params.logit_bias or self.params.penalised or self.grammar is not None or self.bans.any
        return self.params.greedy and not adjusted

    def committed(self, tokens: Sequence[int]) -> None:
        """Tell penalties, bans and the grammar about new output tokens."""
        self.bans.committed(tokens)
        if self.grammar is not None:
            self.grammar.commit(tokens)
        self.rule.count(tokens)

    def adjusted(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, vocabulary] with bias, penalties, bans, grammar; `paths[i]` are row i's uncommitted tokens."""
        logits = self._penalised(logits, paths)
        if self.bans.any:
            logits = self.bans.applied(logits, paths)
        if self.grammar is None:
            return logits
        return logits.masked_fill(~self.grammar.masks(paths).to(logits.device), -torch.inf)

    def _penalised(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        rule = self.rule
        if len(rule.bias_tokens):
            ids, values = (torch.from_numpy(part).to(logits.device) for part in (rule.bias_tokens, rule.bias_values))
            logits = logits.index_add(1, ids, values.expand(logits.shape[0], -1))
        if rule.seen is None or rule.counts is None:
            return logits
        seen, counts = (torch.from_numpy(part).repeat(len(paths), 1) for part in (rule.seen, rule.counts))
        for row, path in enumerate(paths):
            if path:
                ids = torch.tensor(path)
                seen[row, ids] = True
                counts[row].index_add_(0, ids, torch.ones(len(path)))
        seen, counts = seen.to(logits.device), counts.to(logits.device)
        factor = self.params.repetition_penalty
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(seen, penalised, logits)
        return logits - self.params.presence_penalty * (counts > 0) - self.params.frequency_penalty * counts

    def forbids(self, path: Sequence[int], token: int) -> bool:
        """Whether a token is impossible behind uncommitted ones: it is chosen only where no other one is possible."""
        return (
            self.params.logit_bias.get(token, 0.0) == -torch.inf
            or token in self.bans.behind(path)
            or (self.grammar is not None and not self.grammar.accepts((*path, token)))
        )

    def distribution(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Distribution:
        """Adjusted, tempered and filtered (top-k, then top-p, then min-p); for temperature above 0."""
        params = self.params
        scores = self._tempered(self.adjusted(logits, paths))
        ids = None
        if 0 < params.top_k < self.vocabulary:
            scores, ids = scores.topk(params.top_k, -1)
        elif params.top_p < 1:
            scores, ids = scores.sort(dim=-1, descending=True, stable=True)
        if params.top_p < 1:
            mass = scores.softmax(-1)
            scores = scores.masked_fill(mass.cumsum(-1) - mass >= params.top_p, -torch.inf)
        if params.min_p > 0:
            floor = scores.amax(-1, keepdim=True) + torch.log(torch.tensor(params.min_p))
            scores = scores.masked_fill(scores < floor, -torch.inf)
        return Distribution(scores, ids, self.vocabulary)

    def _tempered(self, logits: Tensor) -> Tensor:
        """Logits over the temperature; where that would overflow, the likeliest token's are subtracted first."""
        temperature = self.params.temperature
        if self.rule.temperature < self.rule.tame:
            peak = logits.amax(-1, keepdim=True)
            # Of a row that a grammar leaves nothing there is nothing to subtract.
            logits = logits - peak.masked_fill(peak == -torch.inf, 0.0)
        return logits / temperature

    def perturbed(self, distribution: Distribution, positions: Sequence[int]) -> Tensor:
        """Scores plus the Gumbel noise of each row's next position; its order is a draw without replacement.

        Args:
            positions: absolute positions of the tokens to be drawn, one per row.
        """
        # A stream per position, a counter per token id: the noise of a token is the same wherever it stands.
        keys = {position: mix(position, state=self.rule.stream) for position in positions}
        if distribution.ids is None:
            every = torch.arange(self.vocabulary, device=distribution.scores.device)
            unique = sorted(keys)
            noise = gumbel([keys[position] for position in unique], every)
            if len(unique) < len(positions) or unique != list(positions):
                noise = noise[torch.tensor([unique.index(position) for position in positions])]
            return distribution.scores + noise
        return distribution.scores + gumbel([keys[position] for position in positions], distribution.ids)

    def noise(self, position: int, tokens: Sequence[int]) -> list[float]:
        """The Gumbel noise of a few tokens at an absolute position, as `perturbed` adds it; for drafters."""
        return gumbels(mix(position, state=self.rule.stream), tokens)

    def choose(self, logits: Tensor, positions: Sequence[int], paths: Sequence[Sequence[int]]) -> list[int]:
        """The token of each row: argmax, or the keyed Gumbel draw.

        Args:
            logits: float32 [rows, vocabulary].
            positions: absolute position of the token each row chooses.
            paths: uncommitted tokens above each row, for penalties and grammar.
        """
        logits = logits.cpu()
        allowed = self._allowed(paths)
        each = [None] * len(paths) if allowed is None else allowed[:, None]
        rows = zip(logits.unsqueeze(1), positions, paths, each, strict=True)
        walks = [Walk(self.rule, row, at, above=path, allowed=bits) for row, at, path, bits in rows]
        return [outcome.token for outcome in descend(walks)]

    def walk(self, logits: Tensor, position: int, draft: Draft) -> Walk:
        """What verification does with a draft where each row chooses as in plain decoding.

        Args:
            logits: float32 [nodes + 1 or more, vocabulary]: the root's, then a row per node.
            position: absolute, of the token that the root chooses.
        """
        allowed = None
        if self.grammar is not None or self.bans.any:
            nodes = (ROOT, *range(len(draft)))
            allowed = self._allowed([[draft.tokens[each] for each in draft.path(node)] for node in nodes])
        return Walk(self.rule, logits, position, draft.tokens, draft.parents, allowed=allowed)

    def _allowed(self, paths: Sequence[Sequence[int]]) -> NDArray[np.uint8] | None:
        """[paths, bytes]: what grammar and bans leave behind each, a bit per token, lowest first; None: everything."""
        if self.grammar is None and not self.bans.any:
            return None
        if self.grammar is not None:
            allowed = self.grammar.packed(paths)
        else:
            allowed = np.full((len(paths), -(-self.vocabulary // 8)), 255, np.uint8)
        for row, path in enumerate(paths):
            for token in self.bans.behind(path):
                allowed[row, token >> 3] &= 255 ^ (1 << (token & 7))
        return allowed

    def scratch_bytes(self, rows: int) -> int:
        """Bytes that deciding on a draft, and reporting, takes for a while, at most, beside so many rows of logits.

        By the acceptance rule of the request, whether the draft has sampled nodes or not.
        """
        top = self.params.logprobs
        reporting = 0 if top is None else rows * (self.vocabulary * REPORTING + (top + 1) * KEYS)
        if self.is_argmax:
            return reporting
        row, dense = self._row_bytes, self.vocabulary * DENSE
        deciding = scratch_bytes(self.rule, self.vocabulary)
        if not self.params.greedy and self.params.acceptance == "max":
            # By the rejection rules, what was left and proposed at a node stays while the next is looked at.
            deciding = max(deciding, row + 2 * dense, 4 * dense)
        elif not self.params.greedy and self.params.acceptance == "typical":
            # All distributions on the way stay.
            deciding = max(row, 2 * dense) + (rows - 1) * dense
        return max(deciding, reporting) + rows * KEYS

    def processing_bytes(self, rows: int) -> int:
        """Bytes that so many rows take for a while, at most, where a drafter makes distributions of them or decides."""
        distributions = 0 if self.is_argmax else rows * (self._row_bytes + KEYS)
        return max(distributions, self.scratch_bytes(rows))

    @property
    def _row_bytes(self) -> int:
        """Of one row, to adjust and filter it, and to draw from it, at most."""
        adjusting = PENALISING if self.params.penalised else ADJUSTING
        if self.grammar is not None:
            adjusting += ALLOWING
        kept = self.kept
        drawing = 0 if self.params.greedy else DRAWING * kept
        if kept < self.vocabulary:
            drawing += self.vocabulary * LOGIT_BYTES
        return max(self.vocabulary * adjusting, drawing)

    @property
    def kept(self) -> int:
        """Tokens of a distribution, at most."""
        return self.params.top_k if 0 < self.params.top_k < self.vocabulary else self.vocabulary

    def coins(self, position: int, purpose: int = 0) -> Uniforms:
        """Uniforms for rejection rules at one step, keyed by the step's first position; drafters take a purpose > 0."""
        return Uniforms(self.seed, self.choice, COIN_STREAM, purpose, position)


def likeliest(logits: Tensor) -> list[int]:
    """The token of each row of logits [rows, vocabulary] that has the most, the first of several."""
    # NumPy searches with vector instructions; PyTorch takes seven times as long on the CPU.
    tokens: list[int] = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    return tokens


def likeliest_if_finite(logits: Tensor) -> tuple[list[int], list[bool]]:
    """As `likeliest`, and whether a token can be chosen by each row: not by NaN, nor without a finite largest logit.

    Args:
        logits: a model's own, before bias and constraint, which may forbid all tokens.
    """
    if logits.device.type != "cpu":
        return likeliest(logits), list(map(isfinite, logits.amax(-1).tolist()))
    table = logits.numpy()
    tokens: list[int] = table.argmax(-1).tolist()
    # NaN counts as the largest of all, so the chosen logits tell.
    return tokens, list(map(isfinite, map(table.item, range(len(tokens)), tokens)))


def likeliest_of_model(logits: Tensor) -> list[int]:
    """As `likeliest`, of a model's own logits.

    Raises:
        UserError: by some row no token can be chosen.
    """
    tokens, finite = likeliest_if_finite(logits)
    if not all(finite):
        raise UserError(NOT_FINITE)
    return tokens


def draw(probabilities: Tensor, coin: float) -> int:
    """The token at quantile `coin` of a float64 distribution (normalised here)."""
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, coin * float(cumulative[-1]), right=True))
    if index >= len(probabilities) or probabilities[index] <= 0:
        return int(probabilities.argmax())
    return index
