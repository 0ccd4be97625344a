"""Intervals for a handful of seeds or many samples, tests of pairs, pass@k, and how well a score
tells right from wrong.

Values of another shape, number or length than expected, or not finite, are an `InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit
from scipy.stats import binom, rankdata

from mdmrl.config import require

Values = Sequence[float] | np.ndarray


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """The estimate and, where there are any, the ends: "0.41 [0.32, 0.5]"."""
        ends = "" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.estimate:.3g}{ends}"

    def exp(self) -> Interval:
        """The interval of a quantity from that of its logarithm."""
        return Interval(*np.exp(self).tolist())


def t_interval(values: Values, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of n >= 2 independent, finite values."""
    values = _checked(values, at_least=2)
    mean = values.mean()
    half = _t(len(values), confidence) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(mean), float(mean - half), float(mean + half))


def ratio_interval(a: Values, b: Values, confidence: float = 0.95) -> Interval:
    """Fieller's interval of mean(a) / mean(b), paired by position.

    The ratios r for which the t-interval of mean(a - r b) holds 0. Where mean(b) itself is not
    clear of 0 nothing is known of the ratio, and the ends are infinite.
    """
    a, b = _checked(a, at_least=2), _checked(b, at_least=2)
    _require_as_many(a, b)
    spread = _t(len(a), confidence) ** 2 * np.cov(a, b) / len(a)
    mean_a, mean_b = a.mean(), b.mean()
    # The ends solve square r^2 - 2 middle r + rest = 0.
    square = mean_b**2 - spread[1, 1]
    middle = mean_a * mean_b - spread[0, 1]
    rest = mean_a**2 - spread[0, 0]
    estimate = float(mean_a / mean_b) if mean_b else math.nan
    if square <= 0:
        return Interval(estimate, -math.inf, math.inf)
    half = math.sqrt(max(middle**2 - square * rest, 0.0))
    return Interval(estimate, float((middle - half) / square), float((middle + half) / square))


def bootstrap_interval(
    statistic: Callable[..., float], *columns: np.ndarray, draws: int = 2000, confidence=0.95
) -> Interval:
    """Efron's percentile interval of a statistic of items, each a row of every one of `columns`
    (N, ...); items are drawn with replacement, `draws` times, by a generator of seed 0. A value may
    be infinite."""
    for column in columns:
        _require_as_many(columns[0], column)
    require(len(columns[0]) > 0 and draws >= 100, f"draws={draws}: expected 100, and an item")
    n, rng = len(columns[0]), np.random.default_rng(0)
    drawn = (rng.integers(n, size=n) for _ in range(draws))
    found = np.sort([statistic(*(column[rows] for column in columns)) for rows in drawn])
    tail = int((1 - confidence) / 2 * draws)
    return Interval(float(statistic(*columns)), float(found[tail]), float(found[-1 - tail]))


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share; the estimate is successes / n."""
    require(0 <= successes <= n and n > 0, f"{successes} of {n}: expected 0 <= successes <= n > 0")
    share = successes / n
    z2 = float(ndtri((1 + confidence) / 2)) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n) / (1 + z2 / n)
    # At 0 and n the score interval touches the end exactly, rounding apart.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def clustered_interval(shares: Values, each: int) -> Interval:
    """Wilson's 95 % interval of the mean of `shares`, one an item, over `each` completions each.

    Completions of one item are alike, so that they count as fewer: as the number of independent
    ones that would spread the items' shares as much (the effective sample size of Korn and Graubard
    1998, put into Wilson's interval as in Franco et al. 2019), which is never below the number of
    items nor above that of completions. It is the number of items where all are right or all wrong,
    and with one completion an item, which is `wilson_interval`.
    """
    shares = _checked(shares, at_least=1)
    require(each >= 1, f"each={each}: expected at least one completion an item")
    inside = bool(((shares >= 0) & (shares <= 1)).all())
    require(inside, f"{shares.tolist()}: expected shares, of 0 to 1")
    n, right = len(shares), float(shares.sum())
    share = right / n
    spread = float(((shares - share) ** 2).mean())
    chance = share * (1 - share)  # the spread of one completion an item
    times = min(max(chance / spread if spread else math.inf, 1.0), each) if chance else 1.0
    return wilson_interval(right * times, n * times)


def paired_interval(only_a: int, only_b: int, n: int) -> Interval:
    """Tango's 95 % score interval (1998) of the difference of two shares over the same n items, of
    which `only_a` count in the first share alone and `only_b` in the second alone.

    The differences that a score test does not reject: at 0 it is McNemar's without a correction.
    """
    _require_pairs(only_a, only_b, n)
    z = float(ndtri(0.975))

    def excess(difference: float, side: float) -> float:
        # q is the most likely share of `only_b` if the true difference is this one.
        linear = only_a + only_b + (only_a - only_b - 2 * n) * difference
        constant = only_b * difference * (1 - difference)
        q = (linear + math.sqrt(linear**2 + 8 * n * constant)) / (4 * n)
        variance = n * (2 * q + difference * (1 - difference))
        return only_a - only_b - n * difference - side * z * math.sqrt(max(variance, 0.0))

    # Beside the estimate, where the variance may vanish and with it the excess.
    estimate, aside = (only_a - only_b) / n, 1e-12
    low = brentq(excess, -1.0, estimate - aside, args=(1,)) if estimate > -1 else -1.0
    high = brentq(excess, estimate + aside, 1.0, args=(-1,)) if estimate < 1 else 1.0
    return Interval(estimate, low, high)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test of two shares over the same items: the two-sided binomial p-value of
    `only_a` against `only_b`, the items that count in one of them alone; 1 without any."""
    _require_pairs(only_a, only_b, only_a + only_b)
    return min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


def holm(p_values: Values) -> np.ndarray:
    """p-values adjusted for being as many (Holm 1979), in their order: who rejects those of at most
    alpha errs once or more with a probability of at most alpha, whatever depends on what."""
    p = _checked(p_values, at_least=1)
    require(bool(((p >= 0) & (p <= 1)).all()), f"{p.tolist()}: expected p-values, of 0 to 1")
    order = p.argsort(kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n completions, drawn without replacement, hold one of the `right` ones:
    1 - C(n - right, k) / C(n, k), without bias for k fresh completions (Chen et al. 2021)."""
    require(0 <= right <= n, f"{right} right of n={n}: expected 0 to n")
    require(1 <= k <= n, f"k={k}: expected 1 to n={n}, the completions of a prompt")
    wrong = np.arange(n - right + 1, n + 1)
    return float(1 - np.prod(1 - k / wrong)) if n - right >= k else 1.0


def auroc(scores: Values, positive: Sequence[bool]) -> float:
    """The chance that a positive scores above a negative, ties counting half (Mann and Whitney).

    In closed form from mid-ranks; nan without a positive or without a negative.
    """
    scores, positive = _checked(scores, at_least=1), np.asarray(positive, dtype=bool)
    _require_as_many(scores, positive)
    n = int(positive.sum())
    if n in (0, len(scores)):
        return math.nan
    above = rankdata(scores)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(scores) - n)))


def within_prompt_auroc(
    scores: Values, positive: Sequence[bool], prompts: Sequence[Hashable]
) -> np.ndarray:
    """The AUROC among the completions of each prompt that has both positives and negatives.

    One value a prompt, in the order of first appearance: `t_interval` gives their mean. Between
    prompts a score may only tell hard ones from easy ones; within one it must judge the text.
    """
    scores, positive = _checked(scores, at_least=1), np.asarray(positive, dtype=bool)
    _require_as_many(scores, positive)
    _require_as_many(scores, prompts)
    groups = pd.Series(range(len(scores))).groupby(list(prompts), sort=False)
    found = np.array([auroc(scores[rows], positive[rows]) for _, rows in groups])
    return found[~np.isnan(found)]


def calibration(
    predicted: Values, outcome: Values, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, mean outcome and count of `bins` bins of equally many, by prediction.

    Bins differ by one value at most, the larger ones first; equal predictions may fall into two.
    """
    require(bins >= 1, f"bins={bins}: expected at least 1")
    predicted, outcome = _checked(predicted, at_least=bins), _checked(outcome, at_least=bins)
    _require_as_many(predicted, outcome)
    parts = np.array_split(predicted.argsort(kind="stable"), bins)
    means = ([values[part].mean() for part in parts] for values in (predicted, outcome))
    return (*map(np.array, means), np.array([len(part) for part in parts]))


def _require_as_many(a: Sequence, b: Sequence) -> None:
    require(len(a) == len(b), f"{len(a)} and {len(b)} values: expected as many")


def _require_pairs(only_a: int, only_b: int, n: int) -> None:
    fit = min(only_a, only_b) >= 0 and only_a + only_b <= n
    require(fit, f"{only_a} and {only_b} of {n} items: expected counts of at most all of them")


def _t(n: int, confidence: float) -> float:
    """The two-sided quantile of Student's t for n values."""
    return float(stdtrit(n - 1, (1 + confidence) / 2))


def _checked(values: Values, at_least: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    fit = values.ndim == 1 and len(values) >= at_least
    require(fit, f"values of shape {values.shape}: expected a list of at least {at_least}")
    require(bool(np.isfinite(values).all()), f"{values.tolist()}: expected finite values")
    return values
