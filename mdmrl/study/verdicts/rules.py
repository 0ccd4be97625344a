"""What every verdict rule is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

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


class Finding(NamedTuple):
    """What a rule found: the interval of what it names first, whether its conditions hold, and a
    sentence with the numbers."""

    interval: Interval
    reproduced: bool
    contradicted: bool
    measured: str


def above(measured: str, *bounds: tuple[Interval, float]) -> Finding:
    """Reproduced iff every interval's lower end is above its bound; contradicted iff an upper end
    is below."""
    reproduced = all(interval.low > bound for interval, bound in bounds)
    contradicted = any(interval.high < bound for interval, bound in bounds)
    return Finding(bounds[0][0], reproduced, contradicted, measured)


def below_zero(measured: str, *intervals: Interval) -> Finding:
    """Reproduced iff every upper end is below 0; contradicted iff a lower end is above."""
    reproduced = all(interval.high < 0 for interval in intervals)
    contradicted = any(interval.low > 0 for interval in intervals)
    return Finding(intervals[0], reproduced, contradicted, measured)


def judged(found: Finding, count: int, unit: str = "seed") -> Verdict:
    """The verdict of what was found with so many seeds."""
    interval, reproduced, contradicted, measured = found
    word = "reproduced" if reproduced else "contradicted" if contradicted else "inconclusive"
    said = f"{count} {unit}{'s' if count > 1 else ''}"
    if count < MINIMUM_SEEDS:
        word, said = "inconclusive", f"{said}, needs {MINIMUM_SEEDS} {unit}s"
    ends = (value if math.isfinite(value) else None for value in interval)
    return Verdict(word, *ends, f"{measured} ({said})")


def rule(find: Callable[..., Finding], unit: str = "seed") -> Callable[..., Verdict]:
    """A rule, all of whose arguments are `Seeds`: what `find` finds in them, given as arrays."""

    @wraps(find)
    def judge(*columns: Seeds, **named: Seeds) -> Verdict:
        arrays = columns_of(**inspect.signature(find).bind(*columns, **named).arguments)
        return judged(find(*arrays), len(arrays[0]), unit)

    return judge


def columns_of(**columns: Seeds) -> list[np.ndarray]:
    """The columns as arrays, each with one value a seed; a headroom must be positive."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    counts = {name: array.size for name, array in arrays.items()}
    fit = min(counts.values()) > 0 and len(set(counts.values())) == 1
    wanted = "expected one a seed in every column, the same seeds in each"
    require(fit, f"values given: {counts}: {wanted}")
    for name, array in arrays.items():
        fit = not name.startswith("headroom") or (array > 0).all()
        require(fit, f"{name}={array.tolist()}: expected positive values")
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
