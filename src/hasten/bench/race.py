"""One token per pass and accelerated decoding of the same prompt, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hasten.bench.compare import warm_engines
from hasten.bench.lane import Lane, interleave, reference
from hasten.engine import SamplingParams
from hasten.llm import LLM
from hasten.model import ModelConfig

DEFAULT_PROMPT = (
    "Text:\n"
    "goal = chair\n"
    "  park: root\n"
    "# gray and color\n"
    "key = moon\n"
    "bench = 65\n"
    "# bread and flat\n"
    "neck = salt\n"
    "  post: river\n"
    "  bank: 68\n"
    "item crop, 9 pieces\n"
    "heart = 73\n"
    "body = 88\n"
    "  egg: 34\n"
    "foot = 45\n"
    "  list: salt\n"
    "film = bear\n"
    "Change: add the line 'goal = tin' at the end.\n"
    "Answer:"
)
"""An edit: nearly all of the answer stands in the prompt, as when a model changes a line of a file."""


def default_method(config: ModelConfig, lossless: bool = False) -> str:
    """What to compare with plain decoding where nobody says: it fits the model and needs nothing else."""
    if config.fills_canvas:
        return "freedave" if lossless else "threshold"
    return "ngram" if config.diffusion is None or config.diffusion.alignment == "shifted" else "tidar"


@dataclass(frozen=True)
class RaceResult:
    """Medians over rounds. `speedup` is plain seconds over accelerated seconds, round by round."""

    lanes: list[dict[str, Any]]
    identical: bool
    speedup: float
    text: str

    def document(self) -> dict[str, Any]:
        """The document of `hasten race --json`."""
        return {"lanes": self.lanes, "identical": self.identical, "speedup": self.speedup, "text": self.text}


def race(llm: LLM, prompt: str | Sequence[int], method: str, params: SamplingParams, rounds: int = 5) -> RaceResult:
    """Run the method's reference and the method `rounds` times after one warm-up round.

    Each round has drafters of its own: one that remembers answers would draft this one from the round before.

    Raises:
        UserError: unknown method, bad prompt.
    """
    ids, names = llm.encode(prompt), (reference(llm.engine, method), method)
    runs: list[list[Lane]] = []
    for _ in range(rounds + 1):
        engines = [warm_engines(llm, [name])[name] for name in names]
        lanes = [Lane(llm, engine, name, ids, params) for engine, name in zip(engines, names, strict=True)]
        for _ in interleave(lanes):
            pass
        runs.append(lanes)
    return summarise(llm, runs[1:])


def summarise(llm: LLM, runs: list[list[Lane]]) -> RaceResult:
    """One document from several finished rounds."""
    documents = []
    for index, lane in enumerate(runs[0]):
        seconds = statistics.median(run[index].seconds for run in runs)
        documents.append(
            {
                "method": lane.method,
                "tokens": len(lane.tokens),
                "seconds": round(seconds, 6),
                "tokens_per_second": round(len(lane.tokens) / seconds, 2),
                "tokens_per_step": round(lane.request.statistics.tokens_per_step, 4),
                "steps": lane.request.statistics.steps,
            }
        )
    return RaceResult(
        lanes=documents,
        identical=all(run[0].tokens == run[1].tokens for run in runs),
        speedup=round(statistics.median(run[0].seconds / run[1].seconds for run in runs), 4),
        text=llm.tokenizer.decode(runs[0][0].tokens, skip_special_tokens=True),
    )
