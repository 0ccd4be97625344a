"""Which rows a run and its updates learn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.rewards import complete_rows
from mdmrl.runs import generator_for


def listed(rows: Iterable[dict], name: str = "rows") -> list[dict]:
    """Rows in a list; an InputError for what are none, and for no training rows."""
    fit = isinstance(rows, Iterable) and not isinstance(rows, str | Mapping)
    require(fit, f"{name}={rows!r:.80}: expected a list of dicts")
    rows = list(rows)
    require(len(rows) > 0 or name != "rows", "no training rows given: expected at least one")
    for number, row in enumerate(rows, start=1):
        require(isinstance(row, Mapping), f"{name}: row {number} is {row!r:.80}: expected a dict")
    return rows


def checked_rows(
    policy: Policy, rows: Sequence[dict], eval_rows: Sequence[dict], max_completion_length: int
) -> tuple[Sequence[dict], Sequence[dict]]:
    """Training and held-out rows, each with all columns of both.

    Raises:
        InputError: no training rows, columns that rewards cannot have, or a prompt that leaves no
            room for `max_completion_length` tokens.
    """
    rows, eval_rows = listed(rows), listed(eval_rows, "eval_rows")
    complete = complete_rows([*rows, *eval_rows])
    policy.token_lists([row["prompt"] for row in complete], max_completion_length)
    return complete[: len(rows)], complete[len(rows) :]


def refuse_learnt(rows: Sequence[dict], eval_rows: Sequence[dict]) -> None:
    """Refuse held-out prompts that are among the training rows."""
    learnt = {repr(row["prompt"]) for row in rows}
    for row in eval_rows:
        require(
            repr(row["prompt"]) not in learnt,
            f"the held-out prompt {row['prompt']!r:.80} is among the training rows: take it out",
        )


def rows_of_step(
    rows: Sequence[dict], count: int, step: int, rank: int, processes: int, seed: int
) -> list[dict]:
    """This process's `count` rows of a step, from an endless reading of `rows`, shuffled anew each
    epoch; they depend on (seed, step, rank) alone."""

    def at(position: int) -> dict:
        epoch, index = divmod(position, len(rows))
        return rows[_order(len(rows), epoch, seed)[index].item()]

    first = (step * processes + rank) * count
    return [at(first + i) for i in range(count)]


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(rows: int, epoch: int, seed: int) -> Tensor:
    """In which order an epoch has its rows."""
    return torch.randperm(rows, generator=generator_for(seed, "prompts", epoch))
