"""Scaling laws of drafters: fits with honest errors, of how a figure moves along one axis.

Yan et al. 2025, "Scaling Laws for Speculative Decoding" (2505.07858) report that tokens per step grow linearly in the
logarithm of a drafter's training tokens and of its size, and that speed moves linearly in the logarithm of the batch.
Of the paper only the abstract was at hand: the forms are theirs, and the protocol is hasten's own. It is complete in
itself: weighted least squares, an interval for the slope, a prediction of the largest point by a fit without it, and
competing forms by AICc, since a straight line in the logarithm cannot hold for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import UserError

Vector = NDArray[np.float64]
MINIMUM = 4
"""Points without which nothing is fitted."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Fit:
    """One form, fitted.

    Attributes:
        form: `log-linear` (a * log10 x + b), `power` (c - k * x^-p), `constant`.
        parameters: by name.
        errors: standard error of each.
        r2: share of the (weighted) variance that the form explains.
        worst: largest absolute residual.
        aicc: Akaike's criterion, corrected for few points; infinite where there are too few for the form.
        low, high: the fitted range of x.
    """

    form: str
    parameters: dict[str, float]
    errors: dict[str, float]
    r2: float
    worst: float
    aicc: float
    low: float
    high: float

    def __call__(self, x: float) -> float:
        """What the law says at x."""
        return _value(self.form, self.parameters, x)


def _value(form: str, parameters: Mapping[str, float], x: float) -> float:
    if form == "log-linear":
        return parameters["a"] * math.log10(x) + parameters["b"]
    if form == "power":
        return float(parameters["c"] - parameters["k"] * x ** -parameters["p"])
    return parameters["b"]


@dataclass(frozen=True)
class Law:
    """What the points of one axis say.

    Attributes:
        fits: by form, the one of the least AICc first.
        slope: of the log-linear form, per decade, with its 95 % interval.
        held_out_error: relative error at the largest point, by a log-linear fit without it.
        detected: whether the slope's interval excludes zero. If not, the axis has no effect that these points show.
    """

    fits: tuple[Fit, ...]
    slope: float
    interval: tuple[float, float]
    held_out_error: float
    detected: bool

    @property
    def log_linear(self) -> Fit:
        return next(fit for fit in self.fits if fit.form == "log-linear")

    @property
    def best(self) -> Fit:
        return self.fits[0]

    def document(self) -> dict[str, Any]:
        """As JSON: the slope, and all forms with the best first."""
        return {
            "slope_per_decade": self.slope,
            "interval": list(self.interval),
            "detected": self.detected,
            "r2": self.log_linear.r2,
            "worst_residual": self.log_linear.worst,
            "held_out_error": self.held_out_error,
            "best_form": self.best.form,
            "forms": {fit.form: {**fit.parameters, "aicc": fit.aicc, "r2": fit.r2} for fit in self.fits},
            "range": [self.log_linear.low, self.log_linear.high],
        }


def law(x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None = None) -> Law:
    """Fit all forms to the points of an axis.

    Args:
        x: positive, such as training tokens, parameters or batch sizes.
        y: what was measured there.
        errors: standard errors of y; equal ones if None.

    Raises:
        UserError: fewer than four points, lists of unequal length, x that is not positive or not distinct.
    """
    from scipy import stats

    if len(x) != len(y) or (errors is not None and len(errors) != len(x)):
        raise UserError("a law needs as many values (and errors) as points")
    if len(set(x)) < MINIMUM:
        raise UserError(f"a law needs at least {MINIMUM} different points, not {len(set(x))}")
    if min(x) <= 0:
        raise UserError("the points of an axis must be positive: the law is in their logarithm")
    order = np.argsort(np.asarray(x, float))
    xs, ys = np.asarray(x, float)[order], np.asarray(y, float)[order]
    sigma = np.ones(len(xs)) if errors is None else np.asarray(errors, float)[order]
    fits = [_log_linear(xs, ys, sigma), _power(xs, ys, sigma), _constant(xs, ys, sigma)]
    line = fits[0]
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(xs) - 2)) * line.errors["a"]
    slope = line.parameters["a"]
    interval = (slope - reach, slope + reach)
    without = _log_linear(xs[:-1], ys[:-1], sigma[:-1])
    held_out = abs(without(float(xs[-1])) - float(ys[-1])) / abs(float(ys[-1]))
    ordered = tuple(sorted(fits, key=lambda fit: fit.aicc))
    return Law(ordered, slope, interval, held_out, interval[0] > 0 or interval[1] < 0)


def _log_linear(x: Vector, y: Vector, sigma: Vector) -> Fit:
    design = np.stack([np.log10(x), np.ones_like(x)], axis=1)
    values, errors = _least_squares(design, y, sigma)
    return _fit("log-linear", dict(zip("ab", values, strict=True)), dict(zip("ab", errors, strict=True)), x, y, sigma)


def _constant(x: Vector, y: Vector, sigma: Vector) -> Fit:
    values, errors = _least_squares(np.ones((len(x), 1)), y, sigma)
    return _fit("constant", {"b": values[0]}, {"b": errors[0]}, x, y, sigma)


def _power(x: Vector, y: Vector, sigma: Vector) -> Fit:
    """For each exponent the rest is linear, so one dimension is left to search."""
    from scipy import optimize

    # With x in units of its middle, the exponent and the scale do not fight each other.
    unit = float(np.exp(np.log(x).mean()))

    def rest(exponent: float) -> tuple[Vector, Vector, float]:
        design = np.stack([np.ones_like(x), -((x / unit) ** -exponent)], axis=1)
        values, errors = _least_squares(design, y, sigma)
        return values, errors, float((((design @ values - y) / sigma) ** 2).sum())

    found = optimize.minimize_scalar(lambda e: rest(math.exp(e))[2], bounds=(math.log(0.02), math.log(5)))
    exponent = math.exp(float(found.x))
    values, errors, _ = rest(exponent)
    scale = unit**exponent
    parameters = {"c": float(values[0]), "k": float(values[1]) * scale, "p": exponent}
    return _fit("power", parameters, {"c": float(errors[0]), "k": float(errors[1]) * scale}, x, y, sigma)


def _least_squares(design: Vector, y: Vector, sigma: Vector) -> tuple[Vector, Vector]:
    """Weighted: values and standard errors, with the noise's scale taken from the residuals."""
    weighted, target = design / sigma[:, None], y / sigma
    values = np.asarray(np.linalg.lstsq(weighted, target, rcond=None)[0], dtype=np.float64)
    freedom = max(len(y) - design.shape[1], 1)
    scale = float(((weighted @ values - target) ** 2).sum()) / freedom
    covariance = scale * np.linalg.pinv(weighted.T @ weighted)
    return values, np.asarray(np.sqrt(np.diag(covariance)), dtype=np.float64)


def _fit(form: str, parameters: dict[str, float], errors: dict[str, float], x: Vector, y: Vector, sigma: Vector) -> Fit:
    parameters = {name: float(value) for name, value in parameters.items()}
    residuals = np.array([_value(form, parameters, float(each)) for each in x]) - y
    weights = 1 / sigma**2
    mean = float((weights * y).sum() / weights.sum())
    spread, left = float((weights * (y - mean) ** 2).sum()), float((weights * residuals**2).sum())
    # The noise's scale is estimated, too.
    count, free = len(x), len(parameters) + 1
    penalty = 2 * free + 2 * free * (free + 1) / (count - free - 1) if count > free + 1 else math.inf
    return Fit(
        form=form,
        parameters=parameters,
        errors={name: float(value) for name, value in errors.items()},
        r2=1 - left / spread if spread > 0 else 0.0,
        worst=float(np.abs(residuals).max()),
        aicc=count * math.log(max(left, 1e-300) / count) + penalty,
        low=float(x.min()),
        high=float(x.max()),
    )


def bootstrap_error(
    values: Sequence[Any], figure: Callable[[Sequence[Any]], float], rounds: int = 1000, seed: int = 0
) -> float:
    """Standard error of a figure over prompts, by resampling them.

    Args:
        values: one per prompt, such as (tokens, steps).
        figure: of a sample of them, such as tokens over steps.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(rounds, len(values)))
    return float(np.std([figure([values[i] for i in sample]) for sample in drawn], ddof=1))


def tokens_per_step(acceptance: float, length: int) -> float:
    """What a chain gives whose tokens are each accepted with the same probability (Leviathan et al. 2211.17192)."""
    if acceptance >= 1:
        return length + 1.0
    return (1 - acceptance ** (length + 1)) / (1 - acceptance)
