"""What the verdict rules ask of one training run: plain numbers from its curves and looks.

`gain` and `headroom` are of rewards of training batches, which are drawn and measured; verdicts
rest on `held_out_gain` and `held_out_share`.
"""

import math
from collections.abc import Sequence

import numpy as np

from mdmrl.config import require


def gain(curve: Sequence[float]) -> float:
    """G: mean reward of the last tenth of training minus that of the first tenth."""
    first, last = _tenths(curve)
    return last - first


def headroom(curve: Sequence[float], ceiling: float) -> float:
    """Ceiling minus start, the start being the mean reward of the first tenth of training."""
    first, _ = _tenths(curve)
    require(first < ceiling, f"training starts at {first:.4g}, not below its ceiling {ceiling:.4g}")
    return ceiling - first


def updates_to(curve: Sequence[float], share: float = 0.9, window: int = 5) -> int:
    """Updates until the running mean reward, over the `window` latest, has made `share` of its way
    from the mean of the first tenth to that of the last. A run that gains nothing, or never gets
    there, counts in full."""
    first, last = _tenths(curve)
    window = min(window, len(curve))
    running = np.convolve(curve, np.full(window, 1 / window), mode="valid")
    arrived = np.flatnonzero(running >= first + share * (last - first))
    return int(arrived[0]) + window if last > first and len(arrived) else len(curve)


def kl_ratio(kl_norms: Sequence[float], surrogate_norms: Sequence[float]) -> float:
    """Median over training of |grad beta KL| / |grad surrogate|, from both norms of every update.
    Updates without a surrogate gradient (every group of equal rewards) have no ratio and are left
    out; nan where none is left."""
    kl, surrogate = np.asarray(kl_norms, float), np.asarray(surrogate_norms, float)
    rewarded = surrogate > 0
    return float(np.median(kl[rewarded] / surrogate[rewarded])) if rewarded.any() else math.nan


def law(laws: Sequence[float], first: int = 5) -> float:
    """log mean exp(-d) before training has gone far: the mean over the `first` updates of a run.

    At the very start policy and reference are one and it is 0 whatever is scored: take a run
    without a KL term, which no KL gradient has touched."""
    return float(np.mean(np.asarray(laws, float)[:first]))


def kl_at(reward: float, rewards: Sequence[float], kls: Sequence[float]) -> float:
    """The KL a run has spent where its reward first reaches `reward`, linear between the looks at
    it; nan where it never does, or had it from the start."""
    rewards, kls = np.asarray(rewards, float), np.asarray(kls, float)
    reached = np.flatnonzero(rewards >= reward)
    if not len(reached) or reached[0] == 0:
        return math.nan
    k = reached[0]
    share = (reward - rewards[k - 1]) / (rewards[k] - rewards[k - 1])
    return float(kls[k - 1] + share * (kls[k] - kls[k - 1]))


def collapsed(curve: Sequence[float]) -> bool:
    """Whether reward in the last tenth of training is lower than in the first by more than 5 % of
    what it was."""
    first, last = _tenths(curve)
    return last < first - 0.05 * abs(first)


def held_out_gain(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean over held-out prompts of what a policy has after RL less what it had before, a value a
    prompt, the same prompts at the same places: rewards, or 1 where right and 0 where not, of one
    greedy completion or the mean of several that are sampled."""
    before, after = np.asarray(before, float), np.asarray(after, float)
    fit = before.shape == after.shape and before.ndim == 1
    require(
        fit, f"values of shapes {before.shape} and {after.shape}: expected one a prompt in each"
    )
    return float((after - before).mean())


def held_out_share(before: Sequence[float], after: Sequence[float], ceiling: float) -> float:
    """`held_out_gain` over the ceiling, as the reward can reach it, minus the start."""
    start = float(np.mean(before))
    require(start < ceiling, f"the start is {start:.4g}, not below its ceiling {ceiling:.4g}")
    return held_out_gain(before, after) / (ceiling - start)


def mean_until(cost: Sequence[float], gains: Sequence[float], end: float) -> float:
    """The area under the gains, drawn against a rising cost and linear between looks, from the
    first look to the cost `end`, over the cost of that way."""
    cost, gains = np.asarray(cost, float), np.asarray(gains, float)
    fit = cost[0] < end <= cost[-1] and (np.diff(cost) > 0).all()
    require(fit, f"end={end} of costs {cost.tolist()}: expected a rising list that reaches it")
    inside = cost < end
    ends = np.append(cost[inside], end), np.append(gains[inside], np.interp(end, cost, gains))
    return float(np.trapezoid(ends[1], ends[0]) / (end - cost[0]))


def log_odds(pass_at_k: Sequence[float]) -> float:
    """The log odds of the mean over prompts of pass@k, with half a prompt added to either side
    (Haldane and Anscombe), so that all or none passed has one too."""
    passed, prompts = float(np.sum(pass_at_k)), len(pass_at_k)
    return math.log((passed + 0.5) / (prompts - passed + 0.5))


def at_plateau(right: int, right_longer: int, items: int) -> bool:
    """Whether a model, trained and decayed on so many tokens, is at its plateau: that trained on
    4/3 as many, decayed too, has fewer than 2 points more of at least 5,000 items right."""
    return items >= 5000 and (right_longer - right) / items < 0.02


def _tenths(curve: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of a curve, at least one update each."""
    require(len(curve) >= 2, f"a curve of {len(curve)} updates: expected at least 2")
    tenth = max(1, len(curve) // 10)
    return float(np.mean(curve[:tenth])), float(np.mean(curve[-tenth:]))
