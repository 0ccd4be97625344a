"""Rules on speed against denoising steps (notebook 07)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from mdmrl.config import require
from mdmrl.evaluation.stats import Interval
from mdmrl.study.verdicts.rules import Finding, Verdict, above, interval_of, judged, rule


def fig44_crossing(steps: Sequence[int], log_speed_ratio: np.ndarray) -> Verdict:
    """Fig. 4-4: with few denoising steps the MDM is faster than the AR model, with many slower.

    `log_speed_ratio` is log(MDM's instances/s / AR's), one row a timing, one column a step count.
    The sign at a step count is clear where the interval over timings leaves out 0. Reproduced iff
    the clear signs change exactly once, from faster to slower; contradicted iff every sign is clear
    and they do not. The interval given is that of the steps at which the ratio first falls to 1,
    linear in log steps between the counts.
    """
    table = _column_a_count(steps, log_speed_ratio)
    intervals = [interval_of(column) for column in table.T]
    signs = [(i.low > 0) * 1 - (i.high < 0) * 1 for i in intervals]
    clear = [sign for sign in signs if sign]
    once = clear == sorted(clear, reverse=True) and set(clear) == {1, -1}
    crossings = np.array([_falls_to_zero(np.log(steps), row) for row in table])
    where = interval_of(crossings).exp()
    if np.isfinite(crossings).all():
        measured = f"equally fast at {where} steps"
    else:
        measured = (
            f"no crossing: the log speed ratio runs from {intervals[0]} at {steps[0]:g} to "
            f"{intervals[-1]} at {steps[-1]:g} steps"
        )
    return judged(Finding(where, once, all(signs) and not once, measured), len(table), "timing")


@partial(rule, unit="prompt")
def fig44_less_accurate(right_ar, right_mdm) -> Finding:
    """Fig. 4-4: even at 128 steps the MDM is less accurate than the AR model: the mean difference,
    AR minus MDM, of 1 where a prompt's answer is right and 0 where not is above 0.02."""
    difference = interval_of(right_ar - right_mdm)
    measured = (
        f"AR is right on {right_ar.mean():.1%}, the MDM on {right_mdm.mean():.1%}: "
        f"{difference} more"
    )
    return above(measured, (difference, 0.02))


def diffusion_samples_faster(steps: Sequence[int], log_cost_ratio: np.ndarray) -> Verdict:
    """The central hypothesis, for sampling alone: an MDM needs less than the AR model for the same
    number of right completions.

    `log_cost_ratio` is log(MDM's cost of a right completion / AR's), one row a seed, one column a
    step count; infinite where nothing was right. Reproduced iff at some step count the upper end is
    below 0, with 1 - 0.05 / len(steps) intervals (Bonferroni: the best of many is looked at);
    contradicted iff at every one the lower end is above 0. The interval given is that of the step
    count with the smallest mean.
    """
    table = _column_a_count(steps, log_cost_ratio)
    usable = [k for k, column in enumerate(table.T) if np.isfinite(column).all()]
    if not usable:
        nothing = "no step count gave a right completion with every seed"
        unknown = Interval(math.inf, math.nan, math.nan)
        return judged(Finding(unknown, False, True, nothing), len(table))
    confidence = 1 - 0.05 / len(steps)
    intervals = {k: interval_of(table[:, k], confidence=confidence) for k in usable}
    best = min(usable, key=lambda k: intervals[k].estimate)
    found = Finding(
        intervals[best],
        reproduced=any(interval.high < 0 for interval in intervals.values()),
        contradicted=all(interval.low > 0 for interval in intervals.values()),
        measured=f"at its best step count, {steps[best]:g}, a right completion costs the MDM "
        f"exp({intervals[best]}) times what it costs AR",
    )
    return judged(found, len(table))


def _column_a_count(steps: Sequence[int], ratios: np.ndarray) -> np.ndarray:
    table = np.asarray(ratios, dtype=float)
    expected = (table.shape[0], len(steps))
    require(table.shape == expected, f"ratios of shape {table.shape}: expected {expected}")
    return table


def _falls_to_zero(x: np.ndarray, y: np.ndarray) -> float:
    """Where the line through (x, y) first falls from above to 0; nan where it never does."""
    falls = np.flatnonzero((y[:-1] > 0) & (y[1:] <= 0))
    if not len(falls):
        return math.nan
    k = falls[0]
    return float(x[k] + y[k] / (y[k] - y[k + 1]) * (x[k + 1] - x[k]))
