"""A run's log in a tracker, beside its folder, where `report_to` names one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mdmrl.identity import digest
from mdmrl.runs import Run

PROJECT = "mdmrl"


@contextmanager
def reporting(run: Run, report_to: str) -> Iterator[Callable[[Mapping], None]]:
    """What hands a row of the log to the tracker, which knows the run by its folder, so that one
    that is resumed goes on there too."""
    if report_to == "none":
        yield lambda row: None
        return
    tracker = importlib.import_module(report_to)
    name = f"{run.folder.name}-{digest(str(run.folder.absolute()))}"
    known_by = {"name": name} | ({"id": name} if report_to == "wandb" else {})
    config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    tracker.init(project=PROJECT, config=config, resume="allow", **known_by)

    def report(row: Mapping) -> None:
        tracker.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    try:
        yield report
    finally:
        tracker.finish()
