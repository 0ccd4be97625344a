"""Rules on the instability of the KL term and its cures (notebooks 04 and 08)."""

from __future__ import annotations

import math

import numpy as np

from mdmrl.evaluation.stats import Interval
from mdmrl.study.verdicts.rules import (
    Seeds,
    Verdict,
    columns_of,
    interval_of,
    judged,
    negative,
    shown,
)


def kl_law_predicts(correlation: Seeds) -> Verdict:
    """log mean exp(-d) before training has gone far predicts what the KL term then does.

    Args:
        correlation: Spearman's, over all arms with a KL term, of `law` in the run with the same
            estimator and steps but beta 0, and the arm's G / headroom.

    Reproduced iff the upper end is below 0; contradicted iff the lower end is above 0.
    """
    return negative(correlation, "Spearman's correlation of the law with G/headroom")


def stability_needs_steps(correlation: Seeds) -> Verdict:
    """The more denoising steps, the steadier the KL.

    Args:
        correlation: Spearman's, over step counts, of the count and the log standard deviation of
            the KL over training.

    Reproduced iff the upper end is below 0; contradicted iff the lower end is above 0.
    """
    return negative(correlation, "Spearman's correlation of steps with the spread of the KL")


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
    loss, kl, norm, gain_mdm, headroom_mdm, gain_ar, headroom_ar = columns_of(
        log_ratio_loss=log_ratio_loss,
        log_ratio_kl=log_ratio_kl,
        log_ratio_norm=log_ratio_norm,
        gain_mdm=gain_mdm,
        headroom_mdm=headroom_mdm,
        gain_ar=gain_ar,
        headroom_ar=headroom_ar,
    )
    ratios = [interval_of(column) for column in (loss, kl, norm)]
    share = interval_of(gain_mdm / headroom_mdm, gain_ar / headroom_ar)
    asked = [*((interval, math.log(10)) for interval in ratios), (share, 0.8)]
    factors = [Interval(*np.exp(interval).tolist()) for interval in ratios]
    return judged(
        share,
        len(loss),
        reproduced=all(interval.low >= least for interval, least in asked),
        contradicted=any(interval.high < least for interval, least in asked),
        measured="the standard deviations are smaller by factors of {} (loss), {} (KL) and {} "
        "(gradient norm); the share of the headroom closed is {} times AR's".format(
            *map(shown, factors), shown(share)
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
    ratio, block, whole, room, fell_block, fell_whole = columns_of(
        log_kl_ratio=log_kl_ratio,
        reward_block=reward_block,
        reward_whole=reward_whole,
        headroom_whole=headroom_whole,
        collapsed_block=collapsed_block,
        collapsed_whole=collapsed_whole,
    )
    kl, difference = interval_of(ratio), interval_of((block - whole) / room)
    more = fell_block.sum() > fell_whole.sum()
    return judged(
        kl,
        len(ratio),
        reproduced=kl.high < 0 and not more and difference.low > -0.05,
        contradicted=bool(kl.low > 0 or more or difference.high < -0.05),
        measured=f"log(block/whole) of the exact KL at equal reward is {shown(kl)}; "
        f"{fell_block.sum():.0f} and {fell_whole.sum():.0f} runs collapsed; the final reward "
        f"differs by {shown(difference)} of the headroom",
    )
