"""Tasks: `load_task` gives one by name, `load_rows` reads a user's own JSONL."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from mdmrl.config import load_object, require, unknown
from mdmrl.tasks.base import Task, load_rows

CHECKED = ("countdown", "gsm", "math", "choice", "sudoku")  # tasks whose answers can be checked
PROGRAMS = ("code", "codesearchnet", "human_eval", "dafny")
TASKS = ("medcot", "medcot-sections", *CHECKED, "reasoning", *PROGRAMS)


def load_task(
    task: str | Task | Callable[..., Task], data: str | Path | None = None, **options
) -> Task:
    """A task by name, or one's own.

    Args:
        task: `medcot`; `medcot-sections`, the same with the units of the hierarchy; one of
            `CHECKED`; `reasoning`, their mixture without sudoku; "my_tasks.py:arithmetic", what a
            file defines; a `Task`, or a function that makes one.
        data: a JSON or JSONL file of rows in place of the task's. A task of one's own and those of
            `CHECKED` train on all of them (split `rl`) or are evaluated on them (`test`); the
            latter take their original's layout or their own rows', the original's name on the hub
            (needs the `hub` extra), or "reasoning-gym" (the `gym` extra; not for choice). MedCoT
            takes the fields of the real data set, or its name on the hub, and splits them.
        options: of the function that makes the task: `n_shot=4` puts worked examples before each
            prompt (`CHECKED`), `numbers=4` is Countdown's, `seed` the order of options (choice);
            for `medcot` those of its rewards (`faithful`, `encoder`, ...).
    """
    if task in TASKS:
        make = import_module(f"mdmrl.tasks.{task.replace('-', '_')}").task
        _, *known = inspect.signature(make).parameters
        for name in options:
            if name not in known:
                raise unknown(f"option of {task}", name, known)
        return make(data, **options)
    given = task
    if isinstance(task, str):
        if ".py" not in task:
            raise unknown("task", task, (*TASKS, "FILE.py:NAME"))
        task = load_object(task)
    if not isinstance(task, Task) and callable(task):
        task, options = task(**options), {}
    require(isinstance(task, Task), f"task {given!s:.200} is {task!r:.80}: expected a mdmrl Task")
    require(not options, f"task {task.name} takes no options, got {', '.join(options)}")
    if data is not None:
        rows = load_rows(data)
        task = replace(task, splits={"rl": rows, "test": rows})
    return task
