"""TRL's reward protocol: how rewards are checked, called and summed.

A reward gets everything by name: `prompts`, `completions` and `completion_ids`, every column of the
rows, and `trainer_state`, `log_metric` and `log_extra`. Nothing it returns is used before it has
been checked.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mdmrl.config import InputError, require

if TYPE_CHECKING:
    from torch import Tensor

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
NOT_GIVEN = ("prompt", "completion")  # columns that TRL keeps to itself


@dataclass(frozen=True)
class TrainerState:
    """How far training has come, under transformers' names; zeros outside of training."""

    global_step: int = 0
    max_steps: int = 0


class RewardLog:
    """What rewards report of a batch beside their values.

    Attributes:
        extras: values by column, one a completion, from `log_extra(column, values)`.
    """

    def __init__(self, global_step: int = 0, max_steps: int = 0):
        self.offered = {
            "trainer_state": TrainerState(global_step, max_steps),
            "log_metric": self.log_metric,
            "log_extra": self.log_extra,
        }
        self.extras: dict[str, list] = {}
        self._reported: dict[str, list[float]] = defaultdict(list)

    def log_metric(self, name: str, value: float) -> None:
        self._reported[name].append(float(value))

    def log_extra(self, column: str, values: Sequence) -> None:
        self.extras.setdefault(column, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """The mean of what `log_metric(name, value)` was told, by name."""
        return {name: sum(values) / len(values) for name, values in self._reported.items()}


def reward_values(
    rewards: Sequence[Callable],
    prompts: Sequence[str | list[dict]],
    completions: Sequence[str],
    completion_ids: Sequence[list[int]],
    rows: Sequence[Mapping],
    **offered,
) -> Tensor:
    """The value of every reward for every completion, (B, number of rewards) float64 on the cpu;
    NaN where a reward abstains (None).

    Args:
        completions: texts; rewards get those of message prompts as a list with one message.
        rows: give the columns, which rewards get by name, all but `prompt` and `completion`.
        offered: in place of what a new `RewardLog` offers, such as that of `log.offered`.

    Raises:
        InputError: a reward returns the wrong number of values, or one that is no finite number;
            the message names function, index and value.
    """
    import torch

    offered = RewardLog().offered | offered
    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    written = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    values = []
    for reward in rewards:
        found = reward(
            prompts=list(prompts),
            completions=list(written),
            completion_ids=list(completion_ids),
            **columns,
            **offered,
        )
        if inspect.iscoroutine(found):  # in a thread, since a notebook's own loop is running
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(asyncio.run, found).result()
        values.append(_checked(reward_name(reward), found, len(written)))
    return torch.tensor(values, dtype=torch.float64).T


def total_reward(values: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The sum of what does not abstain, (B,); NaN where all rewards do.

    Args:
        values: (B, number of rewards), from `reward_values`.
        weights: one a reward, all 1 unless given.
    """
    weighted = values if weights is None else values * values.new_tensor(weights)
    return weighted.nan_to_num(0.0).sum(1).masked_fill(values.isnan().all(1), math.nan)


def check_rewards(
    rewards: Sequence[Callable],
    weights: Sequence[float] | None = None,
    rows: Sequence[Mapping] = (),
) -> list[str]:
    """The rewards' names, once all that can be checked before the first completion has been.

    Args:
        rows: where given, each reward must be able to take their columns.

    Raises:
        InputError: rewards that are no list of functions, share a name, or cannot be called with
            what they will be given; weights that are not one finite number a reward.
    """
    import torch

    example = "expected a list of functions, as in rewards=[short]"
    if callable(rewards):
        raise InputError(f"rewards={reward_name(rewards)}: {example}")
    require(isinstance(rewards, list | tuple), f"rewards={rewards!r:.80}: {example}")
    require(len(rewards) > 0, f"no reward functions given: {example}")
    for reward in rewards:
        fit = callable(reward) and not isinstance(reward, type | torch.nn.Module)
        said = f"reward {reward!s:.80} ({type(reward).__name__})"
        require(fit, f"{said}: expected a function, or an object that is called like one")
    names = [reward_name(reward) for reward in rewards]
    twice = {name for name in names if names.count(name) > 1}
    require(not twice, f"two rewards share a name: {', '.join(twice)}; set one's __name__")
    fits = weights is None or (len(weights) == len(names) and all(map(math.isfinite, weights)))
    require(fits, f"reward_weights={weights}: expected {len(names)} numbers, of {', '.join(names)}")
    if rows:
        for name, reward in zip(names, rewards, strict=True):
            _check_signature(name, reward, _columns(rows))
    return names


def complete_rows(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows, each with every column of them all: None where it had none, so that what a reward
    gets does not depend on which rows share its batch.

    Raises:
        InputError: a row without `prompt`, or a column that rewards know as something else.
    """
    for index, row in enumerate(rows):
        fit = isinstance(row, Mapping) and "prompt" in row
        require(fit, f"row {index}, {row!r:.80}: expected a dict with 'prompt'")
    _columns(rows)
    every = dict.fromkeys(name for row in rows for name in row)
    return [row if len(row) == len(every) else {**every, **row} for row in rows]


def reward_name(reward: Callable) -> str:
    """The name a reward is logged under."""
    while isinstance(reward, partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _columns(rows: Sequence[Mapping]) -> list[str]:
    """The columns of the rows that rewards get."""
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        require(
            name not in GIVEN,
            f"column {name!r} of the rows: rewards get something else by this name; rename it",
        )
    return [name for name in names if name not in NOT_GIVEN]


def _check_signature(name: str, reward: Callable, columns: Sequence[str]) -> None:
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # a builtin may not tell
        return
    try:
        signature.bind(**dict.fromkeys((*GIVEN, *columns)))
    except TypeError as error:
        raise InputError(
            f"reward {name!r}: {error}; it is called with {', '.join((*GIVEN, *columns))} by name: "
            "take those it needs, and the others as **columns"
        ) from None


def _checked(name: str, found, count: int) -> list[float]:
    """What a reward returned, NaN for None."""
    listed = isinstance(found, Sequence) or getattr(found, "ndim", 0) == 1
    if not listed or len(found) != count:
        raise InputError(
            f"reward {name!r} returned {len(found) if listed else type(found).__name__}: expected "
            f"a list of {count} values, one a completion"
        )
    return [_number(name, index, value) for index, value in enumerate(found)]


def _number(name: str, index: int, value) -> float:
    if value is None:
        return math.nan
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy's and torch's
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise InputError(
            f"reward {name!r} returned {value!r} ({type(value).__name__}) for completion {index}: "
            "expected a finite number, or None to abstain"
        )
    return float(number)
