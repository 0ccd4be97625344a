"""Tasks: `load_task` gives one by name, `load_rows` reads a user's own JSONL."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from mdmrl.config import unknown
from mdmrl.tasks.base import Task, load_rows

TASKS = ("medcot", "medcot-sections")
__all__ = ["Task", "load_rows", "load_task"]


def load_task(name: str, data: str | Path | None = None, **reward_options) -> Task:
    """A task by name.

    Args:
        name: `medcot`, or `medcot-sections`, the same with the units of the hierarchy.
        data: a JSON or JSONL file with the fields of the real data set, or that data set's hub name
            (needs the `hub` extra); without it the generated corpus.
        reward_options: passed to the task's reward factory (`faithful`, `encoder`, ...).
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return import_module(f"mdmrl.tasks.{name.replace('-', '_')}").task(data, **reward_options)
