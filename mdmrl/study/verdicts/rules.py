"""What every verdict rule is made of.

Intervals are 95 % t-intervals over seeds, over checkpoints where there are several, or over items
(prompts, timings) where the rule says so. A p is twice the chance, were the number at its bound, of
data at least so far on the claimed side, and at most 1: it is below 0.05 if and only if the
interval is clear of the bound on that side.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr

from mdmrl.config import require
from mdmrl.evaluation.stats import Interval, ratio_interval, t_interval

LEVEL = 0.05
MINIMUM_SEEDS = 5  # or checkpoints, or timings
MINIMUM_PROMPTS = 200  # held-out ones, of a claim about learning
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a claim, before any correction for the number of claims.

    Attributes:
        verdict: "reproduced" (p is below 0.05), "contradicted" or "inconclusive".
        estimate, low, high: of the quantity the rule names first; None where it has no finite
            value (one seed has no interval).
        p: the largest of those of the rule's conditions; 1 where a rule's demand on the data (the
            number of seeds, say) is not met; None where the rule has no test.
        seeds: training runs behind the numbers; 0 where items were counted.
        conditional: fewer than five pre-trained checkpoints of a family are behind the numbers.
        measured: one sentence with the numbers.
    """

    verdict: str
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    conditional: bool
    measured: str


class Condition(NamedTuple):
    """One thing that a claim says of a number: its interval, its p, and whether the interval is
    clear of the bound on the other side."""

    interval: Interval
    p: float
    contradicted: bool


class Finding(NamedTuple):
    """The conditions of a rule (the interval given is that of the first), a sentence with the
    numbers, and, where the data do not meet a demand of the rule, which one."""

    conditions: Sequence[Condition]
    measured: str
    lacking: str = ""


def interval_of(values: Values, per: Values | None = None) -> Interval:
    """The interval of mean(values), or of mean(values) / mean(per); its ends are nan, which fulfil
    no condition, for one value or where a value is not finite."""
    columns = [np.asarray(column, float) for column in (values, per) if column is not None]
    if len(columns[0]) < 2 or not np.isfinite(columns).all():
        with np.errstate(all="ignore"):
            mean = columns[0].mean() / (1 if per is None else columns[1].mean())
        return Interval(float(mean), math.nan, math.nan)
    return t_interval(*columns) if per is None else ratio_interval(*columns)


def above(values: np.ndarray, bound: float = 0.0) -> Condition:
    """The mean of the values is above the bound."""
    interval, p = interval_of(values), 1.0
    if not math.isnan(interval.low):
        error, more = values.std(ddof=1) / math.sqrt(len(values)), interval.estimate - bound
        t = more / error if error else math.copysign(math.inf, more) if more else 0.0
        p = min(1.0, 2 * float(stdtr(len(values) - 1, -t)))
    return Condition(interval, p, interval.high < bound)


def below(values: np.ndarray, bound: float = 0.0) -> Condition:
    """The mean of the values is below the bound."""
    (mean, low, high), p, contradicted = above(-values, -bound)
    return Condition(Interval(-mean, -high, -low), p, contradicted)


def judged(
    found: Finding,
    count: int,
    unit: str = "seed",
    least: int = MINIMUM_SEEDS,
    conditional: bool = True,
) -> Verdict:
    """The verdict of what was found with so many seeds, checkpoints or items, of which it takes at
    least so many."""
    p = max(condition.p for condition in found.conditions)
    lacking = [f"needs {least} {unit}s"] * (count < least) + [found.lacking] * bool(found.lacking)
    said = ", ".join([f"{count} {unit}{'s' if count != 1 else ''}", *lacking])
    if lacking:
        p, word = 1.0, "inconclusive"
    elif p < LEVEL:
        word = "reproduced"
    else:
        contradicted = any(condition.contradicted for condition in found.conditions)
        word = "contradicted" if contradicted else "inconclusive"
    ends = (x if math.isfinite(x) else None for x in found.conditions[0].interval)
    seeds = count if unit in ("seed", "checkpoint") else 0
    return Verdict(word, *ends, p, seeds, conditional, f"{found.measured} ({said})")


def rule(unit: str = "seed", least: int = MINIMUM_SEEDS, prompts: int = 0) -> Callable:
    """Makes a verdict rule of what finds something in columns with one value a seed (or `unit`),
    the same seed at the same place in each.

    The rule takes those columns; by name, the checkpoint that each value comes from, where there
    are several (all columns are then means of a checkpoint, and a checkpoint is a seed); of a claim
    about learning, on how many held-out prompts each value rests; and what the function takes by
    name. With fewer than `least` values, or `prompts`, the verdict is "inconclusive".
    """
    asked = prompts

    def decorate(find: Callable[..., Finding]) -> Callable[..., Verdict]:
        @wraps(find)
        def judge(
            *columns: Values, checkpoints: Sequence[Hashable] = (), prompts: int = 0, **facts
        ) -> Verdict:
            parameters = inspect.signature(find).parameters.values()
            names = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
            arrays = _columns(dict(zip(names, columns, strict=True)))
            fit = len(checkpoints) in (0, len(arrays[0]))
            require(
                fit, f"{len(checkpoints)} checkpoints of {len(arrays[0])} values: expected as many"
            )
            kinds, of, needed = list(dict.fromkeys(checkpoints)), unit, least
            if len(kinds) > 1:
                own = [[one == kind for one in checkpoints] for kind in kinds]
                arrays = [np.array([x[mine].mean() for mine in own]) for x in arrays]
                of, needed = "checkpoint", MINIMUM_SEEDS
            found = find(*arrays, **facts)
            if prompts < asked:
                found = found._replace(lacking=f"on {prompts} prompts, needs {asked}")
            return judged(found, len(arrays[0]), of, needed, len(kinds) < MINIMUM_SEEDS)

        return judge

    return decorate


def _columns(columns: dict[str, Values]) -> list[np.ndarray]:
    arrays = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    counts = {name: array.size for name, array in arrays.items()}
    fit = min(counts.values()) > 0 and len(set(counts.values())) == 1
    wanted = "expected one a seed in every column, the same seeds in each"
    require(fit, f"values given: {counts}: {wanted}")
    return list(arrays.values())
