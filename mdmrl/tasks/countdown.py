"""Countdown: reach a target with every given number used exactly once.

An item is a set of numbers and a target; the prompt is "8,13,14:35", the numbers ascending, and the
completion one expression, "14+(8+13)". The generator draws numbers of 1 to 20, an order of them, a
tree and its operators until every intermediate result and the target are whole and from 1 to 99, so
that one prompt has many right completions, and positions written together must agree. Which split
an item falls into is decided by the numbers and the target alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

from mdmrl.tasks.base import Task, split_of

LARGEST_NUMBER = 20
LARGEST_RESULT = 99
OPERATORS: dict[str, Callable] = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
}
# Of three numbers there are 16,000 items; 2,000 are tested.
SHARES = {"pretrain": 0.65, "rl": 0.15, "validation": 0.05, "test": 0.15}
ROWS = {"pretrain": 5000, "rl": 2000, "validation": 500, "test": 2000}


def prompt(nums: Sequence[int], target: int) -> str:
    return f"{','.join(map(str, sorted(nums)))}:{target}"


def item_split(nums: Sequence[int], target: int) -> str:
    """The split of an item, whatever the order of its numbers."""
    return split_of("countdown", prompt(nums, target), shares=SHARES)


def draw(rng: random.Random, numbers: int = 3) -> dict:
    """A row with a solution: `prompt`, `nums`, `target`, `completion`."""
    while True:
        nums = [rng.randint(1, LARGEST_NUMBER) for _ in range(numbers)]
        drawn = _tree(nums, rng)
        if drawn is not None:
            value, text = drawn
            nums = sorted(nums)
            question = {"prompt": prompt(nums, value), "nums": nums, "target": value}
            return question | {"completion": text}


def _tree(nums: Sequence[int], rng: random.Random, outermost: bool = True):
    """The value and text of a random tree over `nums` in their order; None where a result is not
    whole or out of range."""
    if len(nums) == 1:
        return nums[0], str(nums[0])
    cut = rng.randint(1, len(nums) - 1)
    sides = _tree(nums[:cut], rng, False), _tree(nums[cut:], rng, False)
    name = rng.choice(list(OPERATORS))
    if None in sides:
        return None
    (a, left), (b, right) = sides
    value = OPERATORS[name](Fraction(a), Fraction(b))
    if value.denominator != 1 or not 1 <= value <= LARGEST_RESULT:
        return None
    text = f"{left}{name}{right}"
    return int(value), text if outermost else f"({text})"


def rows(split: str, numbers: int = 3, seed: int = 0) -> list[dict]:
    """Distinct items of a split, with a solution each, in a fixed order."""
    rng, found = random.Random(f"countdown/{numbers}/{split}/{seed}"), {}
    while len(found) < ROWS[split]:
        row = draw(rng, numbers)
        if item_split(row["nums"], row["target"]) == split:
            found.setdefault(row["prompt"], row)
    return list(found.values())


def stream(seed: int, start: int = 0, numbers: int = 3) -> Iterator[dict]:
    """An endless supply of pre-training items; item i depends on (seed, i) alone."""
    for index in itertools.count(start):
        rng = random.Random(f"countdown/stream/{seed}/{index}")
        while True:
            row = draw(rng, numbers)
            if item_split(row["nums"], row["target"]) == "pretrain":
                yield row
                break


def task(data=None, numbers: int = 3) -> Task:
    splits = {split: partial(rows, split, numbers) for split in ROWS}
    return Task("countdown", splits, stream=partial(stream, numbers=numbers))
