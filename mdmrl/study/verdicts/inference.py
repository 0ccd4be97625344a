"""The rules of what a policy does as it is: rows 7 to 12, 14, 19 and 21 of the table."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import ttest_ind

from mdmrl.config import require
from mdmrl.evaluation.stats import Interval, mcnemar
from mdmrl.study.verdicts.rules import (
    MINIMUM_PROMPTS,
    Condition,
    Finding,
    Values,
    Verdict,
    above,
    below,
    interval_of,
    judged,
    rule,
)

NO_PLATEAU = "not shown to be at plateau"


@rule("item", MINIMUM_PROMPTS)
def rl_helps(before, after) -> Finding:
    """Row 7, a line a row of Table 4-1: of the same held-out items, 1 where right and 0 where not,
    more are right after RL; McNemar's exact test."""
    found = above(after - before)
    if np.isin([before, after], (0, 1)).all():
        gained, lost = (int((x > y).sum()) for x, y in ((after, before), (before, after)))
        found = found._replace(p=max(found.p, mcnemar(gained, lost)) if found.p < 1 else 1.0)
    said = f"{before.mean():.1%} before RL and {after.mean():.1%} after: {found.interval}"
    return Finding([found], said)


@rule("item", MINIMUM_PROMPTS)
def mdm_passes_ar(mdm, ar) -> Finding:
    """Row 8, a line a row of Table 4-1: of the same items, 1 where right and 0 where not, more are
    right by the tuned MDM than by the AR model."""
    found = above(mdm - ar)
    said = f"the tuned MDM is right on {mdm.mean():.1%}, AR on {ar.mean():.1%}: {found.interval}"
    return Finding([found], said)


def planning_favours_diffusion(
    mdm_countdown: Values,
    ar_countdown: Values,
    mdm_medcot: Values,
    ar_medcot: Values,
    plateau: bool | None = None,
) -> Verdict:
    """Row 9: MDM minus AR on Countdown is above MDM minus AR on MedCoT.

    Args:
        mdm_countdown, ar_countdown, mdm_medcot, ar_medcot: 1 where right and 0 where not, of the
            same items of a task by both models; or, where a task has several pairs of checkpoints,
            the share that each has right.
        plateau: of the line at plateau, whether all of the models are (`quantities.at_plateau`).

    The interval is Welch's, of two independent sets of paired differences.
    """
    sets = ((mdm_countdown, ar_countdown), (mdm_medcot, ar_medcot))
    planning, prose = (np.asarray(x, float) - np.asarray(y, float) for x, y in sets)
    estimate, p = float(planning.mean() - prose.mean()), 1.0
    interval = Interval(estimate, math.nan, math.nan)
    if min(len(planning), len(prose)) > 1 and planning.std() + prose.std() > 0:
        test = ttest_ind(planning, prose, equal_var=False)
        interval = Interval(estimate, *map(float, test.confidence_interval()))
        p = float(test.pvalue) if estimate > 0 else 1.0
    said = f"MDM minus AR is {interval_of(planning)} on Countdown and {interval_of(prose)} on "
    said += f"MedCoT: {interval} more"
    lacking = NO_PLATEAU if plateau is False else ""
    found = Finding([Condition(interval, p, interval.high < 0)], said, lacking)
    return judged(found, min(len(planning), len(prose)), "item")


def faster_at_few_steps(steps: Sequence[int], log_speed_ratio: np.ndarray) -> Verdict:
    """Row 10: with few denoising steps the MDM is faster than the AR model, with many slower.

    `log_speed_ratio` is log(MDM's instances/s / AR's), one row a timing, one column a step count.
    The sign at a step count is clear where the interval over timings leaves out 0. Reproduced iff
    the clear signs change exactly once, from faster to slower; contradicted iff every sign is clear
    and they do not. Signs have no p; the interval given is that of the steps at which the ratio
    first falls to 1, linear in log steps between the counts.
    """
    table = np.asarray(log_speed_ratio, float)
    expected = (table.shape[0], len(steps))
    require(table.shape == expected, f"ratios of shape {table.shape}: expected {expected}")
    intervals = [interval_of(column) for column in table.T]
    signs = [(i.low > 0) * 1 - (i.high < 0) * 1 for i in intervals]
    clear = [sign for sign in signs if sign]
    once = clear == sorted(clear, reverse=True) and set(clear) == {1, -1}
    crossings = np.array([_falls_to_zero(np.log(steps), row) for row in table])
    where = interval_of(crossings).exp()
    said = f"equally fast at {where} steps"
    if not np.isfinite(crossings).all():
        said = f"no crossing: the log speed ratio runs from {intervals[0]} at {steps[0]:g} to "
        said += f"{intervals[-1]} at {steps[-1]:g} steps"
    found = Condition(where, float(not once), all(signs) and not once)
    return replace(judged(Finding([found], said), len(table), "timing"), p=None)


def _falls_to_zero(x: np.ndarray, y: np.ndarray) -> float:
    """Where the line through (x, y) first falls from above to 0; nan where it never does."""
    falls = np.flatnonzero((y[:-1] > 0) & (y[1:] <= 0))
    if not len(falls):
        return math.nan
    k = falls[0]
    return float(x[k] + y[k] / (y[k] - y[k + 1]) * (x[k + 1] - x[k]))


@rule("item")
def less_accurate(right_ar, right_mdm, *, plateau: bool) -> Finding:
    """Row 11: with its full steps (on MedCoT 128) the MDM has at least 0.02 less right than the AR
    model; of the same prompts, 1 where the answer is right and 0 where not. `plateau`: both models
    are (`quantities.at_plateau`)."""
    found = above(right_ar - right_mdm, 0.02)
    said = f"AR is right on {right_ar.mean():.1%}, the MDM on {right_mdm.mean():.1%}: "
    return Finding([found], f"{said}{found.interval} more", "" if plateau else NO_PLATEAU)


@rule()
def few_steps_fail(rate_16, rate_128, rate_ar, used_16, used_128) -> Finding:
    """Row 12: the failure rate of the MDM's texts at 16 steps is more than 0.2 above that at 128,
    and above AR's; the share of the canvas that either uses is said beside."""
    steps, ar = above(rate_16 - rate_128, 0.2), above(rate_16 - rate_ar)
    said = f"the failure rate at 16 steps is {rate_16.mean():.3g}: {steps.interval} above that at "
    said += f"128 steps and {ar.interval} above AR's; {used_16.mean():.0%} and "
    return Finding([steps, ar], f"{said}{used_128.mean():.0%} of the canvas are used")


@rule()
def value_judges(auroc_value, auroc_logprob) -> Finding:
    """Row 14: at half the steps V's area under the ROC curve of the true metric, within prompts, is
    above 0.6 and above that of the mean log-probability of what is revealed."""
    area, more = above(auroc_value, 0.6), above(auroc_value - auroc_logprob)
    said = f"V's area is {area.interval}, {more.interval} above that of the mean log-probability"
    return Finding([area, more], said)


@rule()
def hierarchy_is_faster(nfe_ratio, share_difference, seconds_ratio) -> Finding:
    """Row 19: the hierarchy's critical path has at most half of the forward passes of flat text,
    and what it is not given of the reward is not lower by more than 5 % of its headroom. Seconds,
    hierarchy / flat, are said beside."""
    passes = below(nfe_ratio, math.nextafter(0.5, 1))  # half itself counts
    worse = above(share_difference, -0.05)
    said = f"its critical path has {passes.interval} of flat's forward passes and takes "
    said += f"{interval_of(seconds_ratio)} of its seconds; what it is not given of the reward is "
    return Finding([passes, worse], f"{said}{worse.interval} of the headroom higher")


def dafny_case(wrong_rejected: Sequence[bool], right_verified: bool) -> Verdict:
    """Row 21: of a case of appendix A every wrong program is rejected and the right one verified;
    the verifier's word decides, so that there is neither interval nor p."""
    fits = right_verified and all(wrong_rejected)
    said = f"{sum(wrong_rejected)} of {len(wrong_rejected)} wrong programs rejected, the right one "
    said += "verified" if right_verified else "not verified"
    word = "reproduced" if fits else "contradicted"
    return Verdict(word, None, None, None, None, 0, False, said)
