"""Countdown: reach a target with every given number used exactly once.

An item is a set of numbers and a target; the prompt is "8,13,14:35", the numbers ascending, and the
completion one expression, "14+(8+13)". The generator draws numbers of 1 to 20, an order of them, a
tree and its operators until every intermediate result and the target are whole and from 1 to 99, so
that one prompt has many right completions, and positions written together must agree. Which split
an item falls into is decided by the numbers and the target alone.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import permutations, product

from mdmrl.config import require
from mdmrl.rewards.countdown import countdown_expression, countdown_reward, countdown_right
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import Generator, Gym, Original, task_of, text_of

WHOLE = re.compile(r"-?[0-9]{1,18}")  # longer ones int() may not read
LARGEST_NUMBER = 20
LARGEST_RESULT = 99
OPERATORS: dict[str, Callable] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
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
    value = OPERATORS[name](a, b)
    if not 1 <= value <= LARGEST_RESULT or (name == "/" and a % b):
        return None
    text = f"{left}{name}{right}"
    return value, text if outermost else f"({text})"


def solutions(nums: Sequence[int], target: int) -> list[str]:
    """Every right expression over `nums`, with and without brackets around the parts of one."""

    def forms(part: Sequence[int]) -> Iterator[str]:
        if len(part) == 1:
            yield str(part[0])
        for cut in range(1, len(part)):
            for left, right in product(sides(part[:cut]), sides(part[cut:])):
                yield from (f"{left}{name}{right}" for name in OPERATORS)

    def sides(part: Sequence[int]) -> Iterator[str]:
        for text in forms(part):
            yield from (text, f"({text})")[: len(part)]

    found = {text for order in permutations(nums) for text in forms(order)}
    return sorted(text for text in found if countdown_right(text, nums, target))


def read(fields: dict) -> dict:
    """The row of an item from elsewhere: `nums` and `target`, or `input` and `output`. Of these, a
    whole output is the target of all numbers of the input; any other is a solution, and the input's
    last number the target."""
    if "input" in fields and "nums" not in fields:
        nums, output = _numbers(fields, "input"), text_of(fields, "output")
        if WHOLE.fullmatch(output):
            return _row(nums, int(output))
        return _row(nums[:-1], nums[-1], output)
    target = text_of(fields, "target")
    require(bool(WHOLE.fullmatch(target)), f"field 'target' is {target!r:.80}: expected an integer")
    return _row(_numbers(fields, "nums"), int(target), fields.get("completion"))


def _numbers(fields: dict, name: str) -> list[int]:
    value = fields.get(name)
    given = [n for n in re.split(r"[,\s]+", value) if n] if isinstance(value, str) else value
    fit = isinstance(given, list) and given and all(WHOLE.fullmatch(str(n)) for n in given)
    wanted = 'expected whole numbers, as in [8, 13, 14] or "8,13,14"'
    require(bool(fit), f"field {name!r} is {value!r:.80}: {wanted}")
    return [int(n) for n in given]


def _row(nums: Sequence[int], target: int, solution: str | None = None) -> dict:
    require(len(nums) > 0, "field 'input' holds the target alone: expected numbers before it")
    row = {"prompt": prompt(nums, target), "nums": sorted(nums), "target": target}
    return row if solution is None else row | {"completion": solution}


def _of_gym(item: dict) -> dict:
    facts = item["metadata"]
    return {"nums": facts["numbers"], "target": facts["target"], "completion": item["answer"]}


def metric(completion: str, row: dict) -> bool:
    return countdown_right(completion, row["nums"], row["target"])


@cache  # one, since its items are kept by it
def generator(numbers: int = 3) -> Generator:
    return Generator("countdown", partial(draw, numbers=numbers))


def task(data=None, numbers: int = 3, n_shot: int = 0) -> Task:
    """Countdown with so many `numbers` an item; for the other arguments see `items.task_of`. The
    length that it is completed with goes with the most numbers of an item."""
    most = {"max_value": LARGEST_NUMBER, "max_target": LARGEST_RESULT}
    size = {"min_numbers": numbers, "max_numbers": numbers, "min_value": 1, "min_target": 1}
    made = task_of(
        generator(numbers),
        data,
        n_shot,
        read,
        original=Original(None, "train", max_new_tokens=None),
        gym=Gym("countdown", _of_gym, size | most, shared=True),
        rewards=[countdown_reward],
        metric=metric,
        extract=countdown_expression,
    )
    if data is not None:
        numbers = max(len(row["nums"]) for row in made.rows("test"))
    return replace(made, sampler={"max_new_tokens": 4 * numbers, "steps": 4 * numbers})
