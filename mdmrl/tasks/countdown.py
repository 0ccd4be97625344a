"""Countdown: reach a target with every given number used exactly once.

An item is a set of numbers and a target; the prompt is "8,13,14:35", the numbers ascending, and the
completion one expression, "14+(8+13)". The generator draws numbers of 1 to 20, an order of them, a
tree and its operators until every intermediate result and the target are whole and from 1 to 99, so
that one prompt has many right completions, and positions written together must agree. Which split
an item falls into is decided by the numbers and the target alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

from mdmrl.tasks.base import Generator, Task

LARGEST_NUMBER = 20
LARGEST_RESULT = 99
OPERATORS: dict[str, Callable] = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
}


def prompt(nums: Sequence[int], target: int) -> str:
    return f"{','.join(map(str, sorted(nums)))}:{target}"


def draw(rng: random.Random, numbers: int = 3) -> tuple[str, dict]:
    """An item and a solution of it."""
    while True:
        nums = [rng.randint(1, LARGEST_NUMBER) for _ in range(numbers)]
        drawn = _tree(nums, rng)
        if drawn is not None:
            value, text = drawn
            question = prompt(nums, value)
            row = {"prompt": question, "nums": sorted(nums), "target": value, "completion": text}
            return question, row


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


def task(data=None, numbers: int = 3) -> Task:
    items = Generator("countdown", partial(draw, numbers=numbers))
    length = 4 * numbers
    sampler = {"max_new_tokens": length, "steps": length}
    return Task("countdown", items.splits, stream=items.stream, sampler=sampler)
