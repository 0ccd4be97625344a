"""Calling reward functions: nothing a reward returns is used before it has been checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdmrl.config import InputError


def score(
    rewards: Sequence[Callable],
    prompts: Sequence,
    completions: Sequence[str],
    completion_ids: Sequence[list[int]],
    rows: Sequence[dict],
) -> Tensor:
    """Values of every reward for every completion, (B, number of rewards) float64.

    `rows` give the columns that rewards take by name. None, which leaves a sample out of its
    group, becomes NaN.

    Raises:
        ValueError: a reward returns the wrong number of values, or one that is no finite number;
            the message names function, index and value.
    """
    columns = {k: [row.get(k) for row in rows] for k in rows[0] if k != "prompt"}
    values = []
    for reward in rewards:
        name = reward_name(reward)
        found = reward(
            prompts=list(prompts),
            completions=list(completions),
            completion_ids=list(completion_ids),
            **columns,
        )
        if not isinstance(found, Sequence) or len(found) != len(completions):
            size = len(found) if isinstance(found, Sequence) else type(found).__name__
            raise InputError(
                f"reward {name!r} returned {size}: expected a list of {len(completions)} values, "
                "one a completion"
            )
        values.append([_checked(name, i, value) for i, value in enumerate(found)])
    return torch.tensor(values, dtype=torch.float64).T


def reward_name(reward: Callable) -> str:
    """The name a reward is logged under."""
    return getattr(reward, "__name__", type(reward).__name__)


def _checked(name: str, index: int, value) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"reward {name!r} returned {value!r} ({type(value).__name__}) for completion {index}: "
            "expected a finite number, or None to leave the sample out of its group"
        )
    return float(value)
