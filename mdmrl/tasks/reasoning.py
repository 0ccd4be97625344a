"""The four tasks with answers that can be checked, in one: what the reasoning models learn.

Item i of the stream is item i of one of the tasks, drawn by `SHARES`; `canvas` is how many tokens
that task is completed with.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from mdmrl.tasks import choice, countdown, gsm, math
from mdmrl.tasks.base import Task

SHARES = {"gsm": 0.3, "math": 0.25, "choice": 0.2, "countdown": 0.25}
TASKS = {task.name: task for task in (gsm.task(), math.task(), choice.task(), countdown.task())}


def stream(seed: int, start: int = 0) -> Iterator[dict]:
    """An endless supply of pre-training items; item i depends on (seed, i) alone."""
    for index in itertools.count(start):
        rng = random.Random(f"reasoning/stream/{seed}/{index}")
        task = TASKS[rng.choices(list(SHARES), SHARES.values())[0]]
        row = next(task.stream(seed, index))
        yield row | {"task": task.name, "canvas": task.sampler["max_new_tokens"]}


def task(data=None) -> Task:
    return Task("reasoning", {}, stream=stream)
