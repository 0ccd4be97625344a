"""What every verdict rule is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdmrl.config import require
from mdmrl.evaluation.stats import Interval, ratio_interval, t_interval

MINIMUM_SEEDS = 5
Seeds = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a claim.

    Attributes:
        verdict: "reproduced", "contradicted" or "inconclusive".
        estimate, low, high: of the quantity the rule names first; None where it has no finite
            value (one seed has no interval).
        measured: one sentence with the numbers.
    """

    verdict: str
    estimate: float | None
    low: float | None
    high: float | None
    measured: str


def judged(
    interval: Interval,
    seeds: int,
    reproduced: bool,
    contradicted: bool,
    measured: str,
    unit: str = "seed",
) -> Verdict:
    """The verdict of a rule whose conditions hold or not, on so many seeds."""
    enough = seeds >= MINIMUM_SEEDS
    word = "reproduced" if reproduced else "contradicted" if contradicted else "inconclusive"
    count = f"{seeds} {unit}{'s' if seeds > 1 else ''}"
    if not enough:
        count += f", needs {MINIMUM_SEEDS} {unit}s"
    return Verdict(
        word if enough else "inconclusive",
        *(value if math.isfinite(value) else None for value in interval),
        f"{measured} ({count})",
    )


def negative(values: Seeds, what: str) -> Verdict:
    """Reproduced iff the mean's upper end is below 0; contradicted iff its lower end is above."""
    (values,) = columns_of(values=values)
    interval = interval_of(values)
    return judged(
        interval,
        len(values),
        reproduced=interval.high < 0,
        contradicted=interval.low > 0,
        measured=f"{what} is {shown(interval)}",
    )


def columns_of(**columns: Seeds) -> list[np.ndarray]:
    """The columns as arrays, each with one value a seed; a headroom must be positive."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    counts = {name: array.size for name, array in arrays.items()}
    require(
        min(counts.values()) > 0 and len(set(counts.values())) == 1,
        f"values given: {counts}: expected one a seed in every column, the same seeds in each",
    )
    for name, array in arrays.items():
        if name.startswith("headroom"):
            require(bool((array > 0).all()), f"{name}={array.tolist()}: expected positive values")
    return list(arrays.values())


def interval_of(
    values: np.ndarray, per: np.ndarray | None = None, confidence: float = 0.95
) -> Interval:
    """The interval of mean(values), or of mean(values) / mean(per).

    Its ends are nan, which fulfil no condition, for one seed or a value that is not finite.
    """
    columns = [values] if per is None else [values, per]
    if len(values) < 2 or not np.isfinite(columns).all():
        with np.errstate(all="ignore"):
            mean = values.mean() / (1 if per is None else per.mean())
        return Interval(float(mean), math.nan, math.nan)
    if per is None:
        return t_interval(values, confidence)
    return ratio_interval(values, per, confidence)


def geometric(ratios: np.ndarray) -> Interval:
    """The interval of the geometric mean of ratios, each clipped to [0.001, 1000]."""
    return Interval(*np.exp(interval_of(np.log(np.clip(ratios, 1e-3, 1e3)))).tolist())


def shown(interval: Interval) -> str:
    """Estimate and, where there are any, ends."""
    estimate, low, high = interval
    return f"{estimate:.3g}" if math.isnan(low) else f"{estimate:.3g} [{low:.3g}, {high:.3g}]"
