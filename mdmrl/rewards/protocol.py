"""TRL's reward protocol: how rewards are checked, called and summed.

A reward gets by name `prompts`, `completions`, `completion_ids`, every column of the rows, and
`trainer_state`, `log_metric`, `log_extra`. Nothing it returns is used before it has been checked.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING

from mdmrl.config import InputError, require

if TYPE_CHECKING:
    from torch import Tensor

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
NOT_GIVEN = ("prompt", "completion")  # columns that TRL, too, keeps from rewards
LARGEST = 1e15  # float32 has its square, and sums of that
SAMPLED = ("step", "prompt", "completions", "rewards")  # columns of samples.jsonl
Rewards = Sequence[Callable[..., Sequence[float | None]]]


class RewardLog:
    """What rewards report of a batch beside their values: `extras` by column, one a completion.
    They get `offered`: `log_metric(name, value)` and `log_extra(column, values)` to report with,
    and `trainer_state`, which has `global_step` and `max_steps`."""

    def __init__(self, global_step: int = 0, max_steps: int = 0):
        self.extras: dict[str, list] = defaultdict(list)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self.offered = {
            "trainer_state": SimpleNamespace(global_step=global_step, max_steps=max_steps),
            "log_metric": self._log_metric,
            "log_extra": self._log_extra,
        }

    def _log_metric(self, name: str, value: float) -> None:
        number = plain(value)
        fit = isinstance(name, str) and (isinstance(number, float | bool) or _is_number(number))
        require(fit, f"log_metric({name!r}, {value!r:.80}): expected a name and a number")
        self._metrics[name].append(float(number))

    def _log_extra(self, column: str, values: Sequence) -> None:
        said = f"log_extra({column!r}, {values!r:.80})"
        require(column not in SAMPLED, f"{said}: samples.jsonl has its own {column}; rename it")
        require(isinstance(column, str), f"{said}: expected a name and a list")
        listed = isinstance(values, list | tuple) or getattr(values, "ndim", 0) > 0
        require(listed, f"{said}: expected a list, of one value a completion")
        self.extras[column].extend(values)

    def metrics(self) -> dict[str, float]:
        """By name, the mean of the values reported."""
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}

    def beside(self, found: Mapping, *more: str) -> dict:
        """`metrics` and what else is `found` of a batch, or logged as `more`; an InputError where
        one name is both."""
        own = {name: None if x != x else x for name, x in self.metrics().items()}
        both = ", ".join(sorted(own.keys() & {*found, *more}))
        require(not both, f"log_metric of {both}: the log has its own by this name; rename it")
        return own | found


class Masking:
    """A reward that abstains where the one it is made of fails: from a completion for which that
    returns no number, from all of a batch where it raises, or returns no list of the right length.
    It reports the share, `rewards/NAME/failed`."""

    def __init__(self, reward: Callable):
        self.reward, self.__name__ = reward, reward_name(reward)

    def __call__(self, completions: Sequence, log_metric: Callable, **given) -> list[float | None]:
        count, name, values, wrong = len(completions), self.__name__, [], []
        try:
            found = self.reward(completions=completions, log_metric=log_metric, **given)
            found = _listed(name, found, count)
        except Exception as error:
            found, wrong = [None] * count, [f"{type(error).__name__}: {error}"] * count
        for index, value in enumerate(found):
            try:
                number = _number(name, index, value)
                values.append(None if number != number else number)
            except InputError as error:
                values.append(None)
                wrong.append(str(error))
        if wrong:
            said = f"reward {name!r} failed for {len(wrong)} of {count} completions"
            warnings.warn(f"{said}, which are masked: {wrong[0]}", stacklevel=3)
        log_metric(f"rewards/{name}/failed", len(wrong) / count)
        return values


def reward_values(
    rewards: Rewards,
    prompts: Sequence[str | list[dict]],
    completions: Sequence[str],
    completion_ids: Sequence[list[int]],
    rows: Sequence[Mapping],
    **offered,
) -> Tensor:
    """The value of every reward for every completion, (B, number of rewards) float64 on the cpu;
    NaN where a reward abstains by None.

    Args:
        completions: texts; rewards get that of a message prompt as a list of one message.
        rows: whose columns rewards get, all but `prompt` and `completion`.
        offered: `log.offered` of a `RewardLog`; that of a new one unless given.

    Raises:
        InputError: a reward returns the wrong number of values, or one that is no finite number.
    """
    import torch

    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    written = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    given = {"prompts": prompts, "completions": written, "completion_ids": completion_ids}
    values = []
    for reward in rewards:
        lists = {name: list(items) for name, items in (given | columns).items()}
        name = reward_name(reward)
        try:
            found = reward(**lists, **(RewardLog().offered | offered))
            found = _listed(name, found, len(written))
        except Exception as error:
            error.add_note(f"raised by the reward {name!r}")
            raise
        values.append([_number(name, index, value) for index, value in enumerate(found)])
    return torch.tensor(values, dtype=torch.float64).T


def total_reward(values: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The sum over (B, number of rewards) `values` of what does not abstain, (B,); NaN where all
    rewards do. `weights` are one a reward, all 1 unless given."""
    weighted = values if weights is None else values * values.new_tensor(weights)
    return weighted.nan_to_num(0.0).sum(1).masked_fill(values.isnan().all(1), math.nan)


def check_rewards(
    rewards: Rewards, weights: Sequence[float] | None = None, rows: Sequence[Mapping] = ()
) -> list[str]:
    """The rewards' names, once all that can be checked before the first completion has been.

    Raises:
        InputError: rewards that are no list of functions, share a name, or cannot be called with
            what they will be given, such as the columns of `rows`; weights that are not one finite
            number a reward.
    """
    import torch

    example = "expected a list of functions, as in rewards=[short]"
    said = reward_name(rewards) if callable(rewards) else f"{rewards!r:.80}"
    require(isinstance(rewards, list | tuple), f"rewards={said}: {example}")
    require(len(rewards) > 0, f"no reward functions given: {example}")
    for reward in rewards:
        fit = callable(reward) and not isinstance(reward, type | torch.nn.Module)
        said = f"reward {reward!s:.80} ({type(reward).__name__})"
        require(fit, f"{said}: expected a function, or an object that is called like one")
    names = [reward_name(reward) for reward in rewards]
    twice = {name for name in names if names.count(name) > 1}
    require(not twice, f"two rewards share a name: {', '.join(twice)}; set one's __name__")
    listed = isinstance(weights, Sequence) and len(weights) == len(names)
    fit = weights is None or (listed and all(map(_is_number, weights)))
    require(fit, f"reward_weights={weights}: expected a number for each of {', '.join(names)}")
    given = (*GIVEN, *_columns(rows))
    for name, reward in zip(names, rewards if rows else (), strict=False):
        try:
            inspect.signature(reward).bind(**dict.fromkeys(given))
        except ValueError:  # a builtin may have no signature that can be read
            continue
        except TypeError as error:
            raise InputError(
                f"reward {name!r}: {error}; it is called with {', '.join(given)}, all by name: "
                "take those it needs, and the others as **columns"
            ) from None
    return names


def complete_rows(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows, each with every column that any has, None where it had none: what a reward gets
    does not depend on which rows share a batch.

    Raises:
        InputError: a row without `prompt`, or a column that rewards know as something else.
    """
    require_prompts(rows)
    _columns(rows)
    every = dict.fromkeys(name for row in rows for name in row)
    return [row if len(row) == len(every) else {**every, **row} for row in rows]


def require_prompts(rows: Sequence[Mapping]) -> None:
    """Refuse rows without `prompt`."""
    for index, row in enumerate(rows):
        fit = isinstance(row, Mapping) and "prompt" in row
        require(fit, f"row {index}, {row!r:.80}: expected a dict with 'prompt'")


def reward_name(reward: Callable) -> str:
    """The name a reward is logged under."""
    while isinstance(reward, partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _columns(rows: Sequence[Mapping]) -> list[str]:
    """The columns of the rows that rewards get."""
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        require(isinstance(name, str), f"column {name!r}: expected a name")
    for name in names.keys() & GIVEN:
        raise InputError(f"column {name!r}: rewards get something else by this name; rename it")
    return [name for name in names if name not in NOT_GIVEN]


def _listed(name: str, found, count: int) -> Sequence:
    """What the reward of that name returned, awaited where it has to be, if that is a list of so
    many."""
    if inspect.iscoroutine(found):  # in a thread, since a notebook's own loop is running
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(asyncio.run, found).result()
    listed = isinstance(found, Sequence) and not isinstance(found, bytes)
    listed = listed or getattr(found, "ndim", 0) == 1
    size = len(found) if listed else type(found).__name__
    wanted = f"expected a list of {count} values, one a completion"
    require(size == count, f"reward {name!r} returned {size}: {wanted}")
    return found


def _number(name: str, index: int, value) -> float:
    """One value of the reward of that name, NaN for None."""
    number = math.nan if value is None else plain(value)
    said = f"{value!r} ({type(value).__name__}) for completion {index}"
    require(
        value is None or _is_number(number),
        f"reward {name!r} returned {said}: expected a number, {LARGEST:.0e} at most, or None",
    )
    return float(number)


def plain(value):
    """A number of numpy's or torch's as one of Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_number(value) -> bool:
    """Whether it is a finite number, `LARGEST` at most."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and abs(value) <= LARGEST
