"""What the verdict rules ask of one training run: plain numbers from its curves."""

from __future__ import annotations

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


def _tenths(curve: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of a curve, at least one update each."""
    require(len(curve) >= 2, f"a curve of {len(curve)} updates: expected at least 2")
    tenth = max(1, len(curve) // 10)
    return float(np.mean(curve[:tenth])), float(np.mean(curve[-tenth:]))
