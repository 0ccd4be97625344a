"""Rules on the reward curves of training (notebook 03)."""

from __future__ import annotations

from mdmrl.study.verdicts.rules import (
    Seeds,
    Verdict,
    columns_of,
    geometric,
    interval_of,
    judged,
    shown,
)


def fig41_ar_rises(sampled: Seeds, greedy: Seeds) -> Verdict:
    """Fig. 4-1: the autoregressive model's reward rises.

    Reproduced iff the lower end of G is above 0 for sampled and for greedy rewards; contradicted
    iff either upper end is below 0. The interval given is that of the sampled rewards.
    """
    sampled, greedy = columns_of(sampled=sampled, greedy=greedy)
    both = interval_of(sampled), interval_of(greedy)
    return judged(
        both[0],
        len(sampled),
        reproduced=all(interval.low > 0 for interval in both),
        contradicted=any(interval.high < 0 for interval in both),
        measured=f"G is {shown(both[0])} sampled and {shown(both[1])} greedy",
    )


def fig41_mdm_does_not_converge(
    gain_mdm: Seeds, headroom_mdm: Seeds, gain_ar: Seeds, headroom_ar: Seeds
) -> Verdict:
    """Fig. 4-1: the masked diffusion model does not converge; for each estimator apart.

    Reproduced iff the upper end of the MDM's G/headroom is below a quarter of the AR model's mean;
    contradicted iff the lower end is above it. Where the AR model's mean is not positive there is
    nothing to compare with: inconclusive.
    """
    gain_mdm, headroom_mdm, gain_ar, headroom_ar = columns_of(
        gain_mdm=gain_mdm, headroom_mdm=headroom_mdm, gain_ar=gain_ar, headroom_ar=headroom_ar
    )
    share = interval_of(gain_mdm / headroom_mdm)
    quarter = float((gain_ar / headroom_ar).mean()) / 4
    rises = quarter > 0
    return judged(
        share,
        len(gain_mdm),
        reproduced=rises and share.high < quarter,
        contradicted=rises and share.low > quarter,
        measured=f"the MDM's G/headroom is {shown(share)}, a quarter of AR's mean {quarter:.3g}"
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
    gain_mdm, gain_mdm_beta0, headroom_mdm, gain_ar, headroom_ar, ratio_mdm, ratio_ar = columns_of(
        gain_mdm=gain_mdm,
        gain_mdm_beta0=gain_mdm_beta0,
        headroom_mdm=headroom_mdm,
        gain_ar=gain_ar,
        headroom_ar=headroom_ar,
        ratio_mdm=ratio_mdm,
        ratio_ar=ratio_ar,
    )
    lost_per_seed = gain_ar / headroom_ar * headroom_mdm - gain_mdm
    lost = interval_of(lost_per_seed)
    share = interval_of(gain_mdm_beta0 - gain_mdm, lost_per_seed)
    mdm, ar = (geometric(ratio) for ratio in (ratio_mdm, ratio_ar))
    nothing_lost = lost.high <= 0
    return judged(
        share,
        len(gain_mdm),
        reproduced=not nothing_lost and share.low >= 0.5 and mdm.low > 2 and ar.high < 1,
        contradicted=nothing_lost or share.high < 0.5 or mdm.high < 2,
        measured=("nothing was lost: " if nothing_lost else "")
        + f"the lost G is {shown(lost)}, beta 0 restores a share of {shown(share)}; median "
        f"gradient ratio KL/surrogate {shown(mdm)} for the MDM and {shown(ar)} for AR",
    )


def fig43_longer_is_steadier(log_ratio_std: Seeds, log_ratio_updates: Seeds) -> Verdict:
    """Fig. 4-3: longer completions make the AR model's training steadier and faster.

    Args:
        log_ratio_std: log(long/short) of the standard deviation over training of the summed KL.
        log_ratio_updates: log(long/short) of `updates_to` 90 % of the final reward.

    Reproduced iff both upper ends are below 0; contradicted iff either lower end is above 0. The
    interval given is that of the standard deviation.
    """
    std, updates = columns_of(log_ratio_std=log_ratio_std, log_ratio_updates=log_ratio_updates)
    both = interval_of(std), interval_of(updates)
    return judged(
        both[0],
        len(std),
        reproduced=all(interval.high < 0 for interval in both),
        contradicted=any(interval.low > 0 for interval in both),
        measured=f"log(long/short) is {shown(both[0])} for the standard deviation of the summed "
        f"KL and {shown(both[1])} for the updates to 90 % of the final reward",
    )


def appc_failures(rate_16: Seeds, rate_128: Seeds, rate_ar: Seeds) -> Verdict:
    """Appendix C: at few denoising steps most outputs of the MDM fail (tags, repeats, masks).

    Reproduced iff the failure rate at 16 steps minus that at 128 is above 0.2 (lower end) and the
    rate at 16 minus AR's above 0 (lower end); contradicted iff an upper end lies below. The
    interval given is that of 16 minus 128 steps.
    """
    rate_16, rate_128, rate_ar = columns_of(rate_16=rate_16, rate_128=rate_128, rate_ar=rate_ar)
    steps, ar = interval_of(rate_16 - rate_128), interval_of(rate_16 - rate_ar)
    return judged(
        steps,
        len(rate_16),
        reproduced=steps.low > 0.2 and ar.low > 0,
        contradicted=steps.high < 0.2 or ar.high < 0,
        measured=f"the failure rate at 16 steps is {rate_16.mean():.3g}: {shown(steps)} above "
        f"that at 128 steps and {shown(ar)} above AR's",
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
    with_start, without, final, fell, fell_without = columns_of(
        gain_sft=gain_sft,
        gain_none=gain_none,
        final_difference=final_difference,
        collapsed_sft=collapsed_sft,
        collapsed_none=collapsed_none,
    )
    more, end = interval_of(with_start - without), interval_of(final)
    worse = fell.sum() > fell_without.sum()
    return judged(
        more,
        len(final),
        reproduced=more.low > 0 and not worse,
        contradicted=bool(more.high < 0 or worse),
        measured=f"with a cold start G differs by {shown(more)}, and the final reward by "
        f"{shown(end)}; {fell.sum():.0f} and {fell_without.sum():.0f} runs collapsed",
    )
