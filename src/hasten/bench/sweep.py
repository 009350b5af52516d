"""What lossy decoding costs in accuracy: each decoder with its knob turned from careful to fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.bench.compare import OVERALL, compare, warm_engines
from hasten.bench.ideal import IdealModel
from hasten.bench.prompts import BenchPrompt
from hasten.engine import SamplingParams, registry
from hasten.errors import UserError
from hasten.llm import LLM

Report = Callable[[int], None]
NORMAL = 1.96
"""Standard deviations to either side that hold 95 % of a normal law."""


@dataclass(frozen=True)
class Setting:
    """One point of a curve: a decoder as it was named, its knob's value, and the specification of both together."""

    decoder: str
    knob: str | None
    value: float | None
    method: str


def settings(decoder: str) -> list[Setting]:
    """A decoder, perhaps with parameters of its own, at all values of its knob; as it is if it has none, or it is set.

    Raises:
        UserError: unknown method or parameter.
    """
    method, named = registry.read(decoder)
    knob = method.knob
    if knob is None or named.keys() & set(knob.turns):
        return [Setting(decoder, None, None, decoder)]
    slug, _, given = decoder.partition(":")
    made = []
    for value in knob.values:
        spec = f"{slug}:{','.join(filter(None, (given, knob.at(value, method.parameters))))}"
        made.append(Setting(decoder, knob.name, value, spec))
    return made


def sweep(
    llm: LLM | None,
    decoders: Sequence[str] | None,
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    report: Report = lambda done: None,
) -> dict[str, Any]:
    """Rows, one per setting and category, and what was skipped.

    Args:
        llm: the model; None for the ideal one.
        decoders: specifications; if None, all with a knob that are meant for this kind of model.
        report: is told of each prompt that is done.

    Raises:
        UserError: a decoder that was named is unknown or does not fit; the ideal model does not know the prompts.
    """
    wanted, skipped = list(dict.fromkeys(_turned(llm) if decoders is None else decoders)), {}
    models = [IdealModel(prompt) for prompt in prompts] if llm is None else []
    chosen: list[Setting] = []
    for decoder in wanted:
        found = settings(decoder)
        try:
            if llm is None:
                models[0].engine.drafter(found[0].method)
            else:
                warm_engines(llm, [found[0].method])
        except UserError as error:
            if decoders is not None:
                raise
            skipped[decoder] = str(error)
        else:
            chosen += found
    if llm is None:
        figures: Iterable[dict[str, Any]] = _ideal(models, chosen, prompts, params, report)
    else:
        figures = compare(llm, [setting.method for setting in chosen], prompts, params, report=report)
    by_method = {setting.method: setting for setting in (Setting("plain", None, None, "plain"), *chosen)}
    return {
        "rows": [_row(by_method[row["method"]], row) for row in figures],
        "skipped": [{"method": method, "reason": reason} for method, reason in skipped.items()],
    }


def _turned(llm: LLM | None) -> list[str]:
    """Decoders with a knob that are meant for a model; the ideal one fills masked positions."""
    roles = set(registry.DECODERS)
    if llm is None or llm.model.config.fills_canvas:
        roles = {"denoiser"}
    elif llm.model.config.diffusion is None:
        roles = {"drafter"}
    return [slug for slug, method in registry.decoders().items() if method.knob is not None and method.role in roles]


def _row(setting: Setting, row: dict[str, Any]) -> dict[str, Any]:
    """The figures that make a trade-off, without those of drafting; and how far the accuracy can be trusted."""
    keys = (
        "method", "category", "prompts", "accuracy", "tokens_per_step", "rows_per_token", "speedup", "agreement",
        "identical",
    )  # fmt: skip
    named = {"decoder": setting.decoder, "knob": setting.knob, "value": setting.value}
    accuracy = row.get("accuracy")
    interval = None if accuracy is None else list(wilson(accuracy, row["prompts"]))
    return named | {key: row.get(key) for key in keys} | {"accuracy_interval": interval}


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` answers, to four places.

    Scores between wrong and right spread less than these two do, so that theirs is rather too wide.
    """
    centre = (share + NORMAL**2 / (2 * count)) / (1 + NORMAL**2 / count)
    reach = NORMAL * math.sqrt(share * (1 - share) / count + (NORMAL / (2 * count)) ** 2) / (1 + NORMAL**2 / count)
    return round(max(0.0, centre - reach), 4), round(min(1.0, centre + reach), 4)


def _ideal(
    models: Sequence[IdealModel],
    chosen: Sequence[Setting],
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    report: Report,
) -> list[dict[str, Any]]:
    """The ideal model's rows, with the keys of `compare` but those of time and of plain decoding."""
    totals: dict[tuple[str, str], list[tuple[float, int, int, int]]] = {}
    for number, (model, prompt) in enumerate(zip(models, prompts, strict=True)):
        own = replace(params, max_tokens=model.length, seed=(params.seed or 0) + number)
        for setting in chosen:
            request, right = model.decode(setting.method, own)
            numbers = request.statistics
            for category in (prompt.category, OVERALL):
                cell = totals.setdefault((setting.method, category), [])
                cell.append((right, numbers.tokens, numbers.steps, numbers.rows))
        report(1)
    rows = []
    for setting in chosen:
        for category in dict.fromkeys([*(prompt.category for prompt in prompts), OVERALL]):
            right, tokens, steps, computed = map(sum, zip(*totals[setting.method, category], strict=True))
            count = len(totals[setting.method, category])
            rows.append(
                {
                    "method": setting.method,
                    "category": category,
                    "prompts": count,
                    "accuracy": round(right / count, 4),
                    "tokens_per_step": round(tokens / steps, 4),
                    "rows_per_token": round(computed / tokens, 4),
                }
            )
    return rows
