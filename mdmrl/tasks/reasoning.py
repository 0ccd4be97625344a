"""The four tasks with answers that can be checked, in one: what the reasoning models learn.

Item i of the stream is item i of one of the tasks, drawn by `SHARES`; a split is made of the first
rows of theirs. A row says its `task`, and its `canvas`, the tokens that the task is completed with.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial

from mdmrl.config import require
from mdmrl.tasks import choice, countdown, gsm, math
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import ROWS

SHARES = {"gsm": 0.3, "math": 0.25, "choice": 0.2, "countdown": 0.25}
TASKS = {task.name: task for task in (gsm.task(), math.task(), choice.task(), countdown.task())}


def stream(seed: int, start: int = 0) -> Iterator[dict]:
    """An endless supply of pre-training items; item i depends on (seed, i) alone."""
    for index in itertools.count(start):
        rng = random.Random(f"reasoning/stream/{seed}/{index}")
        task = TASKS[rng.choices(list(SHARES), SHARES.values())[0]]
        yield _row(task, next(task.stream(seed, index)))


def rows(split: str) -> list[dict]:
    """The mixture's rows of a split, in a fixed order."""
    found = []
    for name, share in SHARES.items():
        task = TASKS[name]
        found += [_row(task, row) for row in task.rows(split, round(share * ROWS[split]))]
    random.Random(f"reasoning/{split}").shuffle(found)
    return found


def _row(task: Task, row: dict) -> dict:
    return row | {"task": task.name, "canvas": task.sampler["max_new_tokens"]}


def reasoning_reward(
    prompts: Sequence, completions: Sequence, completion_ids=None, task=None, **columns
) -> list[float]:
    """Each completion's reward in the task that its row says."""
    named = task is not None and all(name in TASKS for name in task)
    require(named, f"the reward 'reasoning_reward' needs the column 'task', of {', '.join(TASKS)}")
    columns = {name: columns[name] for name in ("nums", "target", "answer") if name in columns}
    rewards = []
    for i, name in enumerate(task):
        own = {column: values[i : i + 1] for column, values in columns.items()}
        (reward,) = TASKS[name].rewards
        rewards += reward(prompts[i : i + 1], completions[i : i + 1], **own)
    return rewards


def metric(completion: str, row: dict) -> bool:
    return TASKS[row["task"]].metric(completion, row)


def task(data=None) -> Task:
    require(data is None, f"data={data}: the mixture has items of its own; name one of its tasks")
    splits = {split: partial(rows, split) for split in ROWS}
    longest = max(task.sampler["max_new_tokens"] for task in TASKS.values())
    sampler = {"max_new_tokens": longest, "steps": longest}
    judged = {"rewards": [reasoning_reward], "metric": metric}
    return Task("reasoning", splits, stream=stream, sampler=sampler, **judged)
