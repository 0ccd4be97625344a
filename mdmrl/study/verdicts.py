"""The verdict rules of the claims that rest on training, written before the runs.

A rule is a function of plain numbers (most of them from `mdmrl.study.quantities`), one value a seed
in every column, the same seed at the same place. Intervals are 95 % t-intervals over seeds. With
fewer than five seeds, or where a seed gave no finite number, the verdict is always "inconclusive".
"""

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


# -- Rules --------------------------------------------------------------------------------------


def fig41_ar_rises(sampled: Seeds, greedy: Seeds) -> Verdict:
    """Fig. 4-1: the autoregressive model's reward rises.

    Reproduced iff the lower end of G is above 0 for sampled and for greedy rewards; contradicted
    iff either upper end is below 0. The interval given is that of the sampled rewards.
    """
    sampled, greedy = _columns(sampled=sampled, greedy=greedy)
    both = _interval(sampled), _interval(greedy)
    return _verdict(
        both[0],
        len(sampled),
        reproduced=all(interval.low > 0 for interval in both),
        contradicted=any(interval.high < 0 for interval in both),
        measured=f"G is {_shown(both[0])} sampled and {_shown(both[1])} greedy",
    )


def fig41_mdm_does_not_converge(
    gain_mdm: Seeds, headroom_mdm: Seeds, gain_ar: Seeds, headroom_ar: Seeds
) -> Verdict:
    """Fig. 4-1: the masked diffusion model does not converge; for each estimator apart.

    Reproduced iff the upper end of the MDM's G/headroom is below a quarter of the AR model's mean;
    contradicted iff the lower end is above it. Where the AR model's mean is not positive there is
    nothing to compare with: inconclusive.
    """
    gain_mdm, headroom_mdm, gain_ar, headroom_ar = _columns(
        gain_mdm=gain_mdm, headroom_mdm=headroom_mdm, gain_ar=gain_ar, headroom_ar=headroom_ar
    )
    share = _interval(gain_mdm / headroom_mdm)
    quarter = float((gain_ar / headroom_ar).mean()) / 4
    rises = quarter > 0
    return _verdict(
        share,
        len(gain_mdm),
        reproduced=rises and share.high < quarter,
        contradicted=rises and share.low > quarter,
        measured=f"the MDM's G/headroom is {_shown(share)}, a quarter of AR's mean {quarter:.3g}"
        + ("" if rises else ": AR did not rise, so there is nothing to compare with"),
    )


def fig42_kl_is_the_cause(
    gain_mdm: Seeds,
    gain_mdm_beta0: Seeds,
    headroom_mdm: Seeds,
    gain_ar: Seeds,
    headroom_ar: Seeds,
    ratio_mdm: Seeds,
    ratio_ar: Seeds,
) -> Verdict:
    """Fig. 4-2: the KL term is the cause of the MDM's failure.

    With AR's fraction = gain_ar / headroom_ar of the same seed,
        lost     = fraction * headroom_mdm - gain_mdm  (what the MDM failed to gain)
        restored = gain_mdm_beta0 - gain_mdm           (what it gains more without the KL term)
        share    = mean(restored) / mean(lost)         (Fieller's interval, paired over seeds)
    and the ratios are `kl_ratio` of the runs with the KL term; their interval is that of the mean
    logarithm (ratios clipped to [0.001, 1000], so that one seed cannot decide), compared after
    exponentiation.

    Reproduced iff the share's lower end is at least 1/2, the MDM's ratio's lower end above 2 and
    AR's upper end below 1. Contradicted iff nothing was lost (the upper end of lost is at most 0:
    there is no failure to explain), or the share's upper end is below 1/2, or the MDM's ratio's
    upper end below 2. The interval given is the share's.
    """
    gain_mdm, gain_mdm_beta0, headroom_mdm, gain_ar, headroom_ar, ratio_mdm, ratio_ar = _columns(
        gain_mdm=gain_mdm,
        gain_mdm_beta0=gain_mdm_beta0,
        headroom_mdm=headroom_mdm,
        gain_ar=gain_ar,
        headroom_ar=headroom_ar,
        ratio_mdm=ratio_mdm,
        ratio_ar=ratio_ar,
    )
    lost_per_seed = gain_ar / headroom_ar * headroom_mdm - gain_mdm
    lost = _interval(lost_per_seed)
    share = _interval(gain_mdm_beta0 - gain_mdm, lost_per_seed)
    mdm, ar = (_geometric(ratio) for ratio in (ratio_mdm, ratio_ar))
    nothing_lost = lost.high <= 0
    return _verdict(
        share,
        len(gain_mdm),
        reproduced=not nothing_lost and share.low >= 0.5 and mdm.low > 2 and ar.high < 1,
        contradicted=nothing_lost or share.high < 0.5 or mdm.high < 2,
        measured=("nothing was lost: " if nothing_lost else "")
        + f"the lost G is {_shown(lost)}, beta 0 restores a share of {_shown(share)}; median "
        f"gradient ratio KL/surrogate {_shown(mdm)} for the MDM and {_shown(ar)} for AR",
    )


def fig43_longer_is_steadier(log_ratio_std: Seeds, log_ratio_updates: Seeds) -> Verdict:
    """Fig. 4-3: longer completions make the AR model's training steadier and faster.

    Args:
        log_ratio_std: log(long/short) of the standard deviation over training of the summed KL.
        log_ratio_updates: log(long/short) of `updates_to` 90 % of the final reward.

    Reproduced iff both upper ends are below 0; contradicted iff either lower end is above 0. The
    interval given is that of the standard deviation.
    """
    std, updates = _columns(log_ratio_std=log_ratio_std, log_ratio_updates=log_ratio_updates)
    both = _interval(std), _interval(updates)
    return _verdict(
        both[0],
        len(std),
        reproduced=all(interval.high < 0 for interval in both),
        contradicted=any(interval.low > 0 for interval in both),
        measured=f"log(long/short) is {_shown(both[0])} for the standard deviation of the summed "
        f"KL and {_shown(both[1])} for the updates to 90 % of the final reward",
    )


def appc_failures(rate_16: Seeds, rate_128: Seeds, rate_ar: Seeds) -> Verdict:
    """Appendix C: at few denoising steps most outputs of the MDM fail (tags, repeats, masks).

    Reproduced iff the failure rate at 16 steps minus that at 128 is above 0.2 (lower end) and the
    rate at 16 minus AR's above 0 (lower end); contradicted iff an upper end lies below. The
    interval given is that of 16 minus 128 steps.
    """
    rate_16, rate_128, rate_ar = _columns(rate_16=rate_16, rate_128=rate_128, rate_ar=rate_ar)
    steps, ar = _interval(rate_16 - rate_128), _interval(rate_16 - rate_ar)
    return _verdict(
        steps,
        len(rate_16),
        reproduced=steps.low > 0.2 and ar.low > 0,
        contradicted=steps.high < 0.2 or ar.high < 0,
        measured=f"the failure rate at 16 steps is {rate_16.mean():.3g}: {_shown(steps)} above "
        f"that at 128 steps and {_shown(ar)} above AR's",
    )


def fig44_crossing(steps: Sequence[int], log_speed_ratio: np.ndarray) -> Verdict:
    """Fig. 4-4: with few denoising steps the MDM is faster than the AR model, with many slower.

    Args:
        steps: rising; log_speed_ratio: log(MDM's instances/s / AR's), one row a timing, one column
            a step count.

    The sign at a step count is clear where the interval over timings leaves out 0. Reproduced iff
    the clear signs change exactly once, from faster to slower; contradicted iff every sign is clear
    and they do not. The interval given is that of the steps at which the ratio first falls to 1,
    linear in log steps between the counts.
    """
    table = np.asarray(log_speed_ratio, dtype=float)
    expected = (table.shape[0], len(steps))
    require(table.shape == expected, f"ratios of shape {table.shape}: expected {expected}")
    signs = [(i.low > 0) * 1 - (i.high < 0) * 1 for i in map(_interval, table.T)]
    clear = [sign for sign in signs if sign]
    once = clear == sorted(clear, reverse=True) and set(clear) == {1, -1}
    crossings = np.array([_falls_to_zero(np.log(steps), row) for row in table])
    where = Interval(*np.exp(_interval(crossings)).tolist())
    return _verdict(
        where,
        len(table),
        reproduced=once,
        contradicted=all(signs) and not once,
        measured=f"equally fast at {_shown(where)} steps"
        if np.isfinite(crossings).all()
        else f"no crossing: the log speed ratio runs from {_shown(_interval(table[:, 0]))} at "
        f"{steps[0]:g} to {_shown(_interval(table[:, -1]))} at {steps[-1]:g} steps",
        unit="timing",
    )


def fig44_less_accurate(right_ar: Seeds, right_mdm: Seeds) -> Verdict:
    """Fig. 4-4: even at 128 steps the MDM is less accurate than the AR model.

    Args: 1 where the answer to a prompt is right and 0 where not, the same prompt at the same
    place. Reproduced iff the lower end of the mean difference, AR minus MDM, is above 0.02;
    contradicted iff its upper end is below.
    """
    right_ar, right_mdm = _columns(right_ar=right_ar, right_mdm=right_mdm)
    difference = _interval(right_ar - right_mdm)
    return _verdict(
        difference,
        len(right_ar),
        reproduced=difference.low > 0.02,
        contradicted=difference.high < 0.02,
        measured=f"AR is right on {right_ar.mean():.1%}, the MDM on {right_mdm.mean():.1%}: "
        f"{_shown(difference)} more",
        unit="prompt",
    )


def diffusion_samples_faster(steps: Sequence[int], log_cost_ratio: np.ndarray) -> Verdict:
    """The central hypothesis, for sampling alone: an MDM needs less than the AR model for the same
    number of right completions.

    Args:
        steps: log_cost_ratio: log(MDM's cost of a right completion / AR's), one row a seed, one
            column a step count; infinite where nothing was right.

    Reproduced iff at some step count the upper end is below 0, with 1 - 0.05 / len(steps) intervals
    (Bonferroni: the best of many is looked at); contradicted iff at every one the lower end is
    above 0. The interval given is that of the step count with the smallest mean.
    """
    table = np.asarray(log_cost_ratio, dtype=float)
    expected = (table.shape[0], len(steps))
    require(table.shape == expected, f"ratios of shape {table.shape}: expected {expected}")
    usable = [k for k, column in enumerate(table.T) if np.isfinite(column).all()]
    if not usable:
        return _verdict(
            Interval(math.inf, math.nan, math.nan),
            len(table),
            reproduced=False,
            contradicted=True,
            measured="no step count gave a right completion with every seed",
        )
    confidence = 1 - 0.05 / len(steps)
    intervals = {k: _interval(table[:, k], confidence=confidence) for k in usable}
    best = min(usable, key=lambda k: intervals[k].estimate)
    return _verdict(
        intervals[best],
        len(table),
        reproduced=any(interval.high < 0 for interval in intervals.values()),
        contradicted=all(interval.low > 0 for interval in intervals.values()),
        measured=f"at its best step count, {steps[best]:g}, a right completion costs the MDM "
        f"exp({_shown(intervals[best])}) times what it costs AR",
    )


def kl_law_predicts(correlation: Seeds) -> Verdict:
    """log mean exp(-d) before training has gone far predicts what the KL term then does.

    Args:
        correlation: Spearman's, over all arms with a KL term, of `law` in the run with the same
            estimator and steps but beta 0, and the arm's G / headroom.

    Reproduced iff the upper end is below 0; contradicted iff the lower end is above 0.
    """
    return _negative(correlation, "Spearman's correlation of the law with G/headroom")


def stability_needs_steps(correlation: Seeds) -> Verdict:
    """The more denoising steps, the steadier the KL.

    Args:
        correlation: Spearman's, over step counts, of the count and the log standard deviation of
            the KL over training.

    Reproduced iff the upper end is below 0; contradicted iff the lower end is above 0.
    """
    return _negative(correlation, "Spearman's correlation of steps with the spread of the KL")


def kl_is_cured(
    log_ratio_loss: Seeds,
    log_ratio_kl: Seeds,
    log_ratio_norm: Seeds,
    gain_mdm: Seeds,
    headroom_mdm: Seeds,
    gain_ar: Seeds,
    headroom_ar: Seeds,
) -> Verdict:
    """The recommended configuration is steady, and learns as the AR model does.

    Args:
        log_ratio_loss, log_ratio_kl, log_ratio_norm: log(unstable/recommended) of the standard
            deviations over training of the loss, of the KL (without beta) and of the gradient norm.

    Reproduced iff the lower ends of all three are at least log 10, and that of the MDM's mean
    G/headroom over the AR model's (Fieller's interval) is at least 0.8; contradicted iff one of the
    upper ends is below. The interval given is that of the share of AR's.
    """
    loss, kl, norm, gain_mdm, headroom_mdm, gain_ar, headroom_ar = _columns(
        log_ratio_loss=log_ratio_loss,
        log_ratio_kl=log_ratio_kl,
        log_ratio_norm=log_ratio_norm,
        gain_mdm=gain_mdm,
        headroom_mdm=headroom_mdm,
        gain_ar=gain_ar,
        headroom_ar=headroom_ar,
    )
    ratios = [_interval(column) for column in (loss, kl, norm)]
    share = _interval(gain_mdm / headroom_mdm, gain_ar / headroom_ar)
    asked = [*((interval, math.log(10)) for interval in ratios), (share, 0.8)]
    factors = [Interval(*np.exp(interval).tolist()) for interval in ratios]
    return _verdict(
        share,
        len(loss),
        reproduced=all(interval.low >= least for interval, least in asked),
        contradicted=any(interval.high < least for interval, least in asked),
        measured="the standard deviations are smaller by factors of {} (loss), {} (KL) and {} "
        "(gradient norm); the share of the headroom closed is {} times AR's".format(
            *map(_shown, factors), _shown(share)
        ),
    )


def block_rl_cures_kl(
    log_kl_ratio: Seeds,
    reward_block: Seeds,
    reward_whole: Seeds,
    headroom_whole: Seeds,
    collapsed_block: Seeds,
    collapsed_whole: Seeds,
) -> Verdict:
    """Block-level RL cures the KL instability.

    Args:
        log_kl_ratio: log(block/whole) of `kl_at` at equal reward, the smaller of the two final
            ones; the KL is the exact one of paths, on held-out prompts.
        reward_block, reward_whole, headroom_whole: final held-out rewards, and ceiling minus start.
        collapsed_block, collapsed_whole: 1 where a run `collapsed`.

    Reproduced iff the upper end of the log ratio is below 0, not more block runs collapsed, and the
    lower end of (block - whole) / headroom is above -0.05; contradicted iff the log ratio's lower
    end is above 0, more block runs collapsed, or the upper end of the difference is below -0.05.
    The interval given is that of the log ratio.
    """
    ratio, block, whole, room, fell_block, fell_whole = _columns(
        log_kl_ratio=log_kl_ratio,
        reward_block=reward_block,
        reward_whole=reward_whole,
        headroom_whole=headroom_whole,
        collapsed_block=collapsed_block,
        collapsed_whole=collapsed_whole,
    )
    kl, difference = _interval(ratio), _interval((block - whole) / room)
    more = fell_block.sum() > fell_whole.sum()
    return _verdict(
        kl,
        len(ratio),
        reproduced=kl.high < 0 and not more and difference.low > -0.05,
        contradicted=bool(kl.low > 0 or more or difference.high < -0.05),
        measured=f"log(block/whole) of the exact KL at equal reward is {_shown(kl)}; "
        f"{fell_block.sum():.0f} and {fell_whole.sum():.0f} runs collapsed; the final reward is "
        f"{_shown(difference)} of the headroom higher",
    )


def cold_start_helps(
    gain_sft: Seeds,
    gain_none: Seeds,
    final_difference: Seeds,
    collapsed_sft: Seeds,
    collapsed_none: Seeds,
) -> Verdict:
    """RL gains more after fine-tuning on demonstrations than without.

    Args:
        final_difference: reward in the last tenth of training, with a cold start minus without.
        collapsed_sft, collapsed_none: 1 where a run `collapsed`.

    Reproduced iff the lower end of the difference of G, with a cold start minus without, is above 0
    and not more runs collapsed; contradicted iff its upper end is below 0 or more did. A start that
    is higher leaves less to gain: the final reward is said beside.
    """
    with_start, without, final, fell, fell_without = _columns(
        gain_sft=gain_sft,
        gain_none=gain_none,
        final_difference=final_difference,
        collapsed_sft=collapsed_sft,
        collapsed_none=collapsed_none,
    )
    more, end = _interval(with_start - without), _interval(final)
    worse = fell.sum() > fell_without.sum()
    return _verdict(
        more,
        len(final),
        reproduced=more.low > 0 and not worse,
        contradicted=bool(more.high < 0 or worse),
        measured=f"G is {_shown(more)} higher with a cold start, and the final reward "
        f"{_shown(end)}; {fell.sum():.0f} and {fell_without.sum():.0f} runs collapsed",
    )


def value_judges(auroc_value: Seeds, auroc_logprob: Seeds) -> Verdict:
    """A value function judges half-denoised text.

    Args: areas under the ROC curve within prompts, of states at half the steps: of V, and of the
    mean log-probability of what is revealed.

    Reproduced iff the lower end of V's is above 0.6 and that of the difference above 0;
    contradicted iff either upper end is below. The interval given is V's.
    """
    value, logprob = _columns(auroc_value=auroc_value, auroc_logprob=auroc_logprob)
    area, more = _interval(value), _interval(value - logprob)
    return _verdict(
        area,
        len(value),
        reproduced=area.low > 0.6 and more.low > 0,
        contradicted=area.high < 0.6 or more.high < 0,
        measured=f"V's area is {_shown(area)}, {_shown(more)} above that of the mean "
        "log-probability",
    )


def value_guides(guided: Seeds, best_of_n: Seeds, spent: float) -> Verdict:
    """Value-guided sampling beats choosing among finished texts by the same V, at equal cost.

    Args:
        guided, best_of_n: mean rewards, the same prompt at the same place.
        spent: what guided sampling spent of its budget, which is all that best of n costs.

    Reproduced iff the lower end of the mean difference is above 0; contradicted iff its upper end
    is below and at least 95 % of the budget was spent: with less it had another price.
    """
    guided, best_of_n = _columns(guided=guided, best_of_n=best_of_n)
    more = _interval(guided - best_of_n)
    return _verdict(
        more,
        len(guided),
        reproduced=more.low > 0,
        contradicted=more.high < 0 and spent >= 0.95,
        measured=f"the reward is {_shown(more)} higher than that of best of n, for {spent:.0%} of "
        "its cost",
        unit="prompt",
    )


def few_steps_pay(tuned_few: Seeds, base: Seeds, tuned_many: Seeds) -> Verdict:
    """RL at few denoising steps still pays when the steps are raised at inference.

    Args: rewards with many steps, of the model tuned with few, of the base, and of the model tuned
    with many at the same token-forwards.

    Reproduced iff the lower end of tuned_few - base is above 0; contradicted iff its upper end is
    below. How it compares with tuned_many is said beside.
    """
    few, base, many = _columns(tuned_few=tuned_few, base=base, tuned_many=tuned_many)
    gained, ahead = _interval(few - base), _interval(few - many)
    return _verdict(
        gained,
        len(few),
        reproduced=gained.low > 0,
        contradicted=gained.high < 0,
        measured=f"with many steps, RL with few has gained {_shown(gained)}, and is "
        f"{_shown(ahead)} ahead of RL with many at the same token-forwards",
    )


def hierarchy_is_faster(
    nfe_ratio: Seeds, reward_difference: Seeds, headroom_flat: Seeds
) -> Verdict:
    """The hierarchy needs fewer sequential forward passes than flat text, and is not worse.

    Args:
        nfe_ratio: forward passes on the critical path, hierarchy / flat.
        reward_difference: hierarchy minus flat, of the part of the reward that the hierarchy is
            not given; headroom_flat: the ceiling of that part minus flat.

    Reproduced iff the upper end of the ratio is at most 1/2 and the lower end of the difference
    over the headroom above -0.05; contradicted iff the ratio's lower end is above 1/2 or the
    difference's upper end below -0.05. The interval given is the ratio's.
    """
    ratio, difference, room = _columns(
        nfe_ratio=nfe_ratio, reward_difference=reward_difference, headroom_flat=headroom_flat
    )
    passes, worse = _interval(ratio), _interval(difference / room)
    return _verdict(
        passes,
        len(ratio),
        reproduced=passes.high <= 0.5 and worse.low > -0.05,
        contradicted=passes.low > 0.5 or worse.high < -0.05,
        measured=f"its critical path has {_shown(passes)} of flat's forward passes; its reward is "
        f"{_shown(worse)} of the headroom higher",
    )


# -- Shared parts -------------------------------------------------------------------------------


def _columns(**columns: Seeds) -> list[np.ndarray]:
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


def _falls_to_zero(x: np.ndarray, y: np.ndarray) -> float:
    """Where the line through (x, y) first falls from above to 0; nan where it never does."""
    falls = np.flatnonzero((y[:-1] > 0) & (y[1:] <= 0))
    if not len(falls):
        return math.nan
    k = falls[0]
    return float(x[k] + y[k] / (y[k] - y[k + 1]) * (x[k + 1] - x[k]))


def _interval(
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


def _negative(values: Seeds, what: str) -> Verdict:
    (values,) = _columns(values=values)
    interval = _interval(values)
    return _verdict(
        interval,
        len(values),
        reproduced=interval.high < 0,
        contradicted=interval.low > 0,
        measured=f"{what} is {_shown(interval)}",
    )


def _geometric(ratios: np.ndarray) -> Interval:
    """The interval of the geometric mean of ratios, each clipped to [0.001, 1000]."""
    return Interval(*np.exp(_interval(np.log(np.clip(ratios, 1e-3, 1e3)))).tolist())


def _shown(interval: Interval) -> str:
    estimate, low, high = interval
    return f"{estimate:.3g}" if math.isnan(low) else f"{estimate:.3g} [{low:.3g}, {high:.3g}]"


def _verdict(
    interval: Interval,
    seeds: int,
    reproduced: bool,
    contradicted: bool,
    measured: str,
    unit: str = "seed",
) -> Verdict:
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
