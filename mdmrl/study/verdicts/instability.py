"""Rules on the instability of the KL term and its cures (notebooks 04 and 08)."""

from __future__ import annotations

import math

from mdmrl.study.verdicts.rules import Finding, below_zero, interval_of, rule


@rule
def kl_law_predicts(correlation) -> Finding:
    """log mean exp(-d) before training has gone far predicts what the KL term then does.

    `correlation` is Spearman's, over all arms with a KL term, of `law` in the run with the same
    estimator and steps but beta 0, and the arm's G / headroom: it is below 0."""
    interval = interval_of(correlation)
    return below_zero(f"Spearman's correlation of the law with G/headroom is {interval}", interval)


@rule
def stability_needs_steps(correlation) -> Finding:
    """The more denoising steps, the steadier the KL: Spearman's `correlation`, over step counts, of
    the count and the log standard deviation of the KL over training is below 0."""
    interval = interval_of(correlation)
    return below_zero(
        f"Spearman's correlation of steps with the spread of the KL is {interval}", interval
    )


@rule
def kl_is_cured(
    log_ratio_loss, log_ratio_kl, log_ratio_norm, gain_mdm, headroom_mdm, gain_ar, headroom_ar
) -> Finding:
    """The recommended configuration is steady, and learns as the AR model does.

    The log ratios are log(unstable/recommended) of the standard deviations over training of the
    loss, of the KL (without beta) and of the gradient norm. Reproduced iff the lower ends of all
    three are at least log 10, and that of the MDM's mean G/headroom over the AR model's (Fieller's
    interval) is at least 0.8; contradicted iff one of the upper ends is below. The interval given
    is that of the share of AR's.
    """
    ratios = [interval_of(column) for column in (log_ratio_loss, log_ratio_kl, log_ratio_norm)]
    share = interval_of(gain_mdm / headroom_mdm, gain_ar / headroom_ar)
    asked = [*((interval, math.log(10)) for interval in ratios), (share, 0.8)]
    loss, kl, norm = (interval.exp() for interval in ratios)
    return Finding(
        share,
        reproduced=all(interval.low >= least for interval, least in asked),
        contradicted=any(interval.high < least for interval, least in asked),
        measured=f"the standard deviations are smaller by factors of {loss} (loss), {kl} (KL) and "
        f"{norm} (gradient norm); the share of the headroom closed is {share} times AR's",
    )


@rule
def block_rl_cures_kl(
    log_kl_ratio, reward_block, reward_whole, headroom_whole, collapsed_block, collapsed_whole
) -> Finding:
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
    kl = interval_of(log_kl_ratio)
    difference = interval_of((reward_block - reward_whole) / headroom_whole)
    fell, fell_whole = collapsed_block.sum(), collapsed_whole.sum()
    more = fell > fell_whole
    return Finding(
        kl,
        reproduced=kl.high < 0 and not more and difference.low > -0.05,
        contradicted=kl.low > 0 or more or difference.high < -0.05,
        measured=f"log(block/whole) of the exact KL at equal reward is {kl}; {fell:.0f} and "
        f"{fell_whole:.0f} runs collapsed; the final reward differs by {difference} of the "
        "headroom",
    )
