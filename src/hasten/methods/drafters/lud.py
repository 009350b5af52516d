"""LUD, lexical unit decoding: placeholders behind the text say the tokens of a span that is all but determined.

"Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs", 2024, arXiv 2405.15208. A
lexical unit is a run of tokens that a model is sure of once it knows the beginning. The model is trained (`hasten
train lud`) to continue one from placeholders: k of them behind the text predict the k tokens behind the next one in the
same pass. The leading ones whose probability is at least beta are taken; where the model is unsure, a step is plain
decoding.

Exactness: lossy. Nothing verifies a span; only the token that a step ends with is what the model says to the text
before it, and that text may be another one than plain decoding's. With `verified=true` a span is a draft like any
other, and the text that of plain decoding of the same weights. So it always is where tokens are sampled: drawing
placeholders one by one would be a product of marginals.

Decisions where the paper leaves room (its abstract, and summaries of it, were to be had):

- *When a span is read.* A span's tokens have no keys yet. Here they are the next pass's draft, which is kept without
  being judged (`Draft.trusted`): its rows are read as the paper has it, and the tokens come out of that pass. So a text
  that ends within a span takes one more pass; and so does its beginning, as no placeholders stand behind a prompt.
- *Repetition.* Placeholders do not see what those before them chose, and tend to say it again. A span is cut before a
  token with which the last tokens of the step repeat those before them, unless each of them has at least `repeated`.
- *Confidence* is the model's own probability, whatever penalties, bans and a grammar make of the choice.

Format: an ordinary checkpoint, and `lud.safetensors` beside its weights: `placeholder` [hidden], an embedding that is
none of a token's, so that it cannot be said; `count`, how many of them the model was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.engine import Draft, Drafter, Knob, Observation, Probe, Request, SoftRows, Target, register
from hasten.engine.memory import LOGIT_BYTES
from hasten.engine.prompt import EMBEDDED
from hasten.errors import UserError, require
from hasten.files import replacing
from hasten.methods.heads.files import read_tensors, require_names, require_shape

FILE = "lud.safetensors"
MOST = 16
"""Placeholders."""


@dataclass(frozen=True)
class LudParameters:
    """Parameters.

    Attributes:
        beta: least probability of a token that is taken from a placeholder. Above 1 none is.
        placeholders: behind the text; 0: as many as the model was trained with.
        repeated: least probability of tokens that repeat those before them.
        verified: whether spans are verified, which makes the method lossless.
        file: of the placeholder; by default the checkpoint's own.

    Raises:
        UserError: out of range.
    """

    beta: float = 0.9
    placeholders: int = 0
    repeated: float = 0.99
    verified: bool = False
    file: str = ""

    def __post_init__(self) -> None:
        checks = (
            (self.beta > 0, "beta must be positive"),
            (0 <= self.placeholders <= MOST, f"placeholders must be between 0 (the model's own) and {MOST}"),
            (self.repeated > 0, "repeated must be positive"),
        )
        require(checks, "lud")


def save_placeholder(vector: Tensor, count: int, file: Path) -> None:
    """Write what a model was trained with, where `lud` finds it.

    Args:
        vector: [hidden].

    Raises:
        UserError: it cannot be written.
    """
    with replacing(file) as fresh:
        save_file({"placeholder": vector.detach().float().contiguous(), "count": torch.tensor(count)}, fresh)


def load_placeholder(file: Path, hidden: int) -> tuple[Tensor, int]:
    """The vector, float32 [hidden], and how many placeholders the model was trained with.

    Args:
        hidden: the model's width.

    Raises:
        UserError: there is none, it is damaged, or for another model.
    """
    if not file.exists():
        raise UserError(
            f"lud: {file.parent.name} was not trained for it: `hasten train lud --model MODEL --output FOLDER` makes "
            "such a model of it"
        )
    tensors = read_tensors(file)
    require_names(file, tensors, ("placeholder", "count"))
    require_shape(file, "placeholder", tensors["placeholder"], hidden)
    require_shape(file, "count", tensors["count"])
    count = int(tensors["count"])
    if not 1 <= count <= MOST:
        raise UserError(f"{file}: count must be between 1 and {MOST}, not {count}")
    return tensors["placeholder"].float(), count


def own_placeholder(target: Target) -> dict[str, Any]:
    """Where a checkpoint's own is, if it is a folder."""
    folder = None if target.folder is None else Path(target.folder)
    return {} if folder is None or folder.is_file() else {"file": str(folder / FILE)}


@register(
    "lud",
    family="drafters",
    exactness="lossy",
    paper="2405.15208",
    title="LUD: spans of sure tokens, from placeholders",
    parameters=LudParameters,
    needs_training=True,
    knob=Knob("beta", (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)),
    defaults=own_placeholder,
    command="hasten train lud --output my-lud",
)
class Lud(Drafter):
    """Keeps, per request, the span that the next pass reads.

    Raises:
        UserError: the model was not trained for it.
    """

    alone = True

    def __init__(self, target: Target, parameters: LudParameters) -> None:
        if not parameters.file:
            raise UserError("lud: needs a checkpoint's folder, or to be told where its placeholder is (lud:file=FILE)")
        self.config, self.parameters, self.ends = target.model.config, parameters, target.end_ids
        vector, trained = load_placeholder(Path(parameters.file), self.config.hidden_size)
        count = parameters.placeholders or trained
        if count > trained:
            raise UserError(f"lud: placeholders must be at most {trained}, which the model was trained with")
        sees = torch.ones(count, count, dtype=torch.bool).tril()
        self._forms = [
            SoftRows(vector.repeat(size, 1), tuple(range(1, size + 1)), sees[:size, :size])
            for size in range(1, count + 1)
        ]
        self._spans: dict[int, list[int]] = {}

    @property
    def memory_bytes(self) -> int:
        return sum(form.states.nbytes for form in self._forms)

    def scratch_bytes(self, requests: Sequence[Request], nodes: int) -> int:
        return max(request.sampler.processing_bytes(1) for request in requests) + self.config.vocab_size * LOGIT_BYTES

    def propose(self, request: Request, budget: int) -> Draft:
        # What is proposed stays until it is observed: a request that is preempted meanwhile is asked again.
        left = request.stopper.left - 1
        draft = Draft.chain(self._spans.get(request.id, [])[: min(budget, left)])
        draft.trusted = request.params.greedy and not self.parameters.verified
        # What stands behind the end of the context, or where nothing more may come, is of no use.
        room = min(self.config.max_positions - len(request.tokens), left - 1) - len(draft)
        if room > 0:
            soft = self._forms[:room][-1]
            draft.probes.append(Probe(len(draft) - 1, [EMBEDDED] * len(soft), soft=soft))
        return draft

    def observe(self, request: Request, seen: Observation) -> None:
        self._spans.pop(request.id, None)
        if len(seen.path) == len(seen.draft) and len(seen.probes):
            self._spans[request.id] = self._span(request, seen.logits[len(seen.draft)], seen.probes)

    def end(self, request: Request) -> None:
        self._spans.pop(request.id, None)

    def _span(self, request: Request, own: Tensor, probes: Tensor) -> list[int]:
        """The tokens behind the last one that are taken.

        Args:
            own: logits [vocabulary] that the last token was chosen by.
            probes: those of the placeholders [placeholders, vocabulary].
        """
        sampler, ends = request.sampler, request.params.endings(self.ends)
        # No repetition is longer than the step, and what it repeats is as long again.
        text = request.tokens[-2 * (len(probes) + 1) :]
        known, sure = len(text), [_probability(own, text[-1])]
        for row in probes:
            span = text[known:]
            if text[-1] in ends:
                break
            (token,) = sampler.choose(row.unsqueeze(0), [len(request.tokens) + len(span)], [span])
            text.append(token)
            sure.append(_probability(row, token))
            if sure[-1] < self.parameters.beta or self._repeats(text, sure):
                return span
        return text[known:]

    def _repeats(self, text: Sequence[int], sure: Sequence[float]) -> bool:
        """Whether the last tokens repeat those before them, and are not sure enough for that.

        Args:
            sure: probabilities of the step's tokens, which are the last ones.
        """
        return any(
            text[-size:] == text[-2 * size : -size] and min(sure[-size:]) < self.parameters.repeated
            for size in range(1, min(len(sure), len(text) // 2) + 1)
        )


def _probability(logits: Tensor, token: int) -> float:
    """A token's probability by logits [vocabulary]."""
    return float((logits[token] - logits.logsumexp(0)).exp())
