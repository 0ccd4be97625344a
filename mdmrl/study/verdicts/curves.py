"""Rules on the reward curves of training (notebook 03)."""

from __future__ import annotations

import numpy as np

from mdmrl.study.verdicts.rules import Finding, above, below_zero, interval_of, rule


@rule
def fig41_ar_rises(sampled, greedy) -> Finding:
    """Fig. 4-1: the autoregressive model's reward rises: G is above 0 for sampled and for greedy
    rewards."""
    one, other = interval_of(sampled), interval_of(greedy)
    return above(f"G is {one} sampled and {other} greedy", (one, 0), (other, 0))


@rule
def fig41_mdm_does_not_converge(gain_mdm, headroom_mdm, gain_ar, headroom_ar) -> Finding:
    """Fig. 4-1: the masked diffusion model does not converge; for each estimator apart.

    Reproduced iff the upper end of the MDM's G/headroom is below a quarter of the AR model's mean;
    contradicted iff the lower end is above it. Where the AR model's mean is not positive there is
    nothing to compare with: inconclusive.
    """
    share = interval_of(gain_mdm / headroom_mdm)
    quarter = float((gain_ar / headroom_ar).mean()) / 4
    rises = quarter > 0
    return Finding(
        share,
        reproduced=rises and share.high < quarter,
        contradicted=rises and share.low > quarter,
        measured=f"the MDM's G/headroom is {share}, a quarter of AR's mean {quarter:.3g}"
        + ("" if rises else ": AR did not rise, so there is nothing to compare with"),
    )


@rule
def fig42_kl_is_the_cause(
    gain_mdm, gain_mdm_beta0, headroom_mdm, gain_ar, headroom_ar, ratio_mdm, ratio_ar
) -> Finding:
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
    lost_per_seed = gain_ar / headroom_ar * headroom_mdm - gain_mdm
    lost = interval_of(lost_per_seed)
    share = interval_of(gain_mdm_beta0 - gain_mdm, lost_per_seed)
    logs = (np.log(np.clip(ratio, 1e-3, 1e3)) for ratio in (ratio_mdm, ratio_ar))
    mdm, ar = (interval_of(log).exp() for log in logs)
    nothing_lost = lost.high <= 0
    return Finding(
        share,
        reproduced=not nothing_lost and share.low >= 0.5 and mdm.low > 2 and ar.high < 1,
        contradicted=nothing_lost or share.high < 0.5 or mdm.high < 2,
        measured=("nothing was lost: " if nothing_lost else "")
        + f"the lost G is {lost}, beta 0 restores a share of {share}; median "
        f"gradient ratio KL/surrogate {mdm} for the MDM and {ar} for AR",
    )


@rule
def fig43_longer_is_steadier(log_ratio_std, log_ratio_updates) -> Finding:
    """Fig. 4-3: longer completions make the AR model's training steadier and faster.

    log(long/short), of the standard deviation over training of the summed KL and of `updates_to`
    90 % of the final reward, is below 0."""
    std, updates = interval_of(log_ratio_std), interval_of(log_ratio_updates)
    measured = (
        f"log(long/short) is {std} for the standard deviation of the summed KL and "
        f"{updates} for the updates to 90 % of the final reward"
    )
    return below_zero(measured, std, updates)


@rule
def appc_failures(rate_16, rate_128, rate_ar) -> Finding:
    """Appendix C: at few denoising steps most outputs of the MDM fail (tags, repeats, masks): the
    failure rate at 16 steps minus that at 128 is above 0.2, and that at 16 minus AR's above 0."""
    steps, ar = interval_of(rate_16 - rate_128), interval_of(rate_16 - rate_ar)
    measured = (
        f"the failure rate at 16 steps is {rate_16.mean():.3g}: {steps} above that at 128 "
        f"steps and {ar} above AR's"
    )
    return above(measured, (steps, 0.2), (ar, 0))


@rule
def cold_start_helps(
    gain_sft, gain_none, final_difference, collapsed_sft, collapsed_none
) -> Finding:
    """RL gains more after fine-tuning on demonstrations than without.

    Reproduced iff the lower end of the difference of G, with a cold start minus without, is above 0
    and not more runs `collapsed` (1, else 0); contradicted iff its upper end is below 0 or more
    did. A start that is higher leaves less to gain: the difference of the final reward, in the last
    tenth of training, is said beside.
    """
    more, end = interval_of(gain_sft - gain_none), interval_of(final_difference)
    worse = collapsed_sft.sum() > collapsed_none.sum()
    return Finding(
        more,
        reproduced=more.low > 0 and not worse,
        contradicted=more.high < 0 or worse,
        measured=f"with a cold start G differs by {more}, and the final reward by "
        f"{end}; {collapsed_sft.sum():.0f} and {collapsed_none.sum():.0f} runs collapsed",
    )
