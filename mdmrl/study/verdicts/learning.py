"""The rules of what training does: rows 1 to 6, 13 and 15 to 18 of the table, and 20.

"Gain" is the held-out difference from the same policy before RL, and "share" the gain over ceiling
minus start: `quantities.held_out_gain` and `quantities.held_out_share`, greedy or sampled.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import permutations

import numpy as np
from scipy.stats import fisher_exact, rankdata

from mdmrl.config import require
from mdmrl.study.verdicts.rules import (
    LEVEL,
    MINIMUM_PROMPTS,
    Condition,
    Finding,
    Verdict,
    above,
    below,
    interval_of,
    judged,
    rule,
)

held_out = rule(prompts=MINIMUM_PROMPTS)


@held_out
def ar_improves(gain) -> Finding:
    """Row 1: the AR model's gain is above 0."""
    found = above(gain)
    return Finding([found], f"the gain is {found.interval}")


@held_out
def mdm_does_not_converge(share_mdm, share_ar) -> Finding:
    """Row 2: the MDM's share is below a quarter of AR's, paired, so that the interval is that of
    the difference and AR's own spread counts. Where AR gains nothing there is nothing to compare
    with: inconclusive."""
    found = below(share_mdm - share_ar / 4)
    said = f"the MDM's share is {interval_of(share_mdm)}, AR's {interval_of(share_ar)}; the MDM's "
    rose = share_ar.mean() > 0
    said += f"less a quarter of AR's {found.interval}"
    return Finding([found], said, "" if rose else "AR did not rise")


@rule()
def loss_is_unstable(log_ratio_std) -> Finding:
    """Row 3: the log ratio, MDM / AR, of the standard deviation over training of the summed KL is
    above 0."""
    found = above(log_ratio_std)
    said = "the log ratio of the standard deviation of the summed KL, MDM / AR, is"
    return Finding([found], f"{said} {found.interval}")


@held_out
def kl_is_the_cause(share_mdm, share_beta0, share_ar) -> Finding:
    """Row 4: at beta 0 the MDM's share rises by at least half of what it lacks to AR's. Where it
    lacks nothing there is no failure to explain: inconclusive."""
    lacked, restored = share_ar - share_mdm, share_beta0 - share_mdm
    found = above(restored - lacked / 2)
    said = f"the MDM's share lacks {interval_of(lacked)} to AR's, β = 0 gives back "
    said += f"{interval_of(restored)}: {found.interval} more than half"
    return Finding([found], said, "" if lacked.mean() > 0 else "nothing was lacking")


@rule()
def kl_dominates(ratio_mdm, ratio_ar) -> Finding:
    """Row 5: the median over updates of |grad beta KL| / |grad surrogate| (`quantities.kl_ratio`)
    is above 2 for the MDM and below 1 for AR; intervals of the mean logarithm, ratios clipped to
    [0.001, 1000], so that one run cannot decide."""
    mdm, ar = (np.log(np.clip(ratio, 1e-3, 1e3)) for ratio in (ratio_mdm, ratio_ar))
    large, small = above(mdm, math.log(2)), below(ar)
    found = [large._replace(interval=large.interval.exp()), small]
    said = "the median ratio of the gradients' norms, KL / surrogate, is"
    return Finding(
        found, f"{said} {found[0].interval} for the MDM and {small.interval.exp()} for AR"
    )


@rule()
def longer_is_better(log_ratio) -> Finding:
    """Row 6, a line a quantity: its log ratio, long / short completions, is below 0."""
    found = below(log_ratio)
    return Finding([found], f"the log ratio long / short is {found.interval}")


@held_out
def block_rl_cures_kl(log_kl_ratio, share_difference) -> Finding:
    """Row 13: changed by one factor, the exact KL on held-out prompts at equal gain
    (`quantities.kl_at`) is lower, its log ratio below 0, and the share not lower by more than
    0.05."""
    kl, share = below(log_kl_ratio), above(share_difference, -0.05)
    said = f"the log ratio of the exact KL at equal gain is {kl.interval}, the share differs by"
    return Finding([kl, share], f"{said} {share.interval}")


def stability_needs_steps(steps: Sequence[int], log_std: np.ndarray) -> Verdict:
    """Row 15: Spearman's correlation of the steps with the log standard deviation of the KL, which
    has one row a seed and one column a step count, is below 0.

    With few step counts seeds agree by chance, in which a t-test sees certainty: p is at least the
    exact one, every order of each seed's step counts being as likely as any other.
    """
    table, n = np.asarray(log_std, float), len(steps)
    fits = table.ndim == 2 and table.shape[1] == n > 1 and sorted(set(steps)) == list(steps)
    said = f"steps={list(steps)}, log_std of shape {table.shape}"
    require(fits, f"{said}: expected rising step counts, a column each")
    places = np.arange(n)
    apart = ((rankdata(table, axis=1) - 1 - places) ** 2).sum(1)  # of ranks, squared
    found = below(1 - 6 * apart / (n**3 - n))
    if found.p < 1:
        orders = np.array(list(permutations(places)))
        law = np.bincount(((orders - places) ** 2).sum(1)) / len(orders)
        chance = reduce(np.convolve, [law] * len(table))[math.floor(apart.sum()) :].sum()
        found = found._replace(p=max(found.p, min(1.0, 2 * float(chance))))
    said = f"Spearman's correlation of steps with the spread of the KL is {found.interval}"
    return judged(Finding([found], said), len(table))


@held_out
def samples_faster(area_mdm, area_ar) -> Finding:
    """Row 16: the area under the gain, drawn against positions computed or rollout seconds up to
    what both families spent (`quantities.mean_until`), is larger for the MDM than for AR."""
    found = above(area_mdm - area_ar)
    said = f"the mean gain on the way is {found.interval} higher for the MDM than for AR"
    return Finding([found], said)


@held_out
def cold_start_helps(gain_sft, gain_none, *, collapsed: Sequence[Sequence[bool]]) -> Finding:
    """Row 17: the gain from a start fine-tuned on demonstrations is larger than without.

    `collapsed` says of every run, with the fine-tuned start and without, whether it
    `quantities.collapsed`: runs count, also where a checkpoint has several. Not reproduced where
    Fisher's exact test finds that more did with it.
    """
    more = above(gain_sft - gain_none)
    (sft, none), runs = map(sum, collapsed), tuple(map(len, collapsed))
    worse = more_often((sft, none), runs)
    steady = Condition(more.interval, float(worse < LEVEL), False)
    said = f"with a cold start the gain differs by {more.interval}; {sft} of {runs[0]} and {none} "
    said += f"of {runs[1]} runs collapsed (p = {worse:.2g} by Fisher's test)"
    return Finding([more, steady], said)


@held_out
def reward_is_hacked(gain_component, gain_metric) -> Finding:
    """Row 18: a component of the reward rises while the true metric falls."""
    risen, fallen = above(gain_component), below(gain_metric)
    said = f"the component gains {risen.interval}, the true metric {fallen.interval}"
    return Finding([risen, fallen], said)


@rule()
def rl_narrows(log_odds_1, log_odds_128, *, samples: int, base: Sequence[float]) -> Finding:
    """Row 20: the log odds of pass@1 rise with RL and those of pass@128 fall.

    Args:
        log_odds_1, log_odds_128: tuned minus base at one temperature (`quantities.log_odds`).
        samples: of every prompt, at least 256; base: pass@1 of the base model on each prompt,
            between 0.05 and 0.5.
    """
    first, last = above(log_odds_1), below(log_odds_128)
    said = f"the log odds differ by {first.interval} at k = 1 and {last.interval} at k = 128"
    lacking = [f"{samples} samples, needs 256"] * (samples < 256)
    between = min(base) >= 0.05 and max(base) <= 0.5
    lacking += ["base pass@1 must lie between 0.05 and 0.5"] * (not between)
    return Finding([first, last], said, ", ".join(lacking))


def more_often(events: tuple[int, int], runs: tuple[int, int]) -> float:
    """Fisher's exact p, one-sided, that the first of two groups of runs has the event more
    often."""
    table = [[event, n - event] for event, n in zip(events, runs, strict=True)]
    return float(fisher_exact(table, alternative="greater").pvalue)
