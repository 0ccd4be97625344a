"""How far a reproduction has come, and about how long it will still take."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mdmrl.config import InputError
from mdmrl.progress import duration
from mdmrl.runs import write_atomically
from mdmrl.study.outputs import project_root

EVERY = 8.0  # seconds between lines where there is no terminal
UNKNOWN = 60.0  # seconds of a notebook that nobody has timed
PRIOR = 30.0  # seconds for which this machine is taken to be as fast as the one that was timed


@dataclass
class Running:
    """A notebook that runs: what its lines begin with, when it and its cell at hand began, and the
    seconds of its cells that have ended."""

    label: str
    started: float
    cell_started: float
    taken: list[float] = field(default_factory=list)


class Progress:
    """Says which cells of which notebooks run and how long is left: lines that change on a
    terminal, elsewhere lines at least every 10 s.

    The time left is what cells took when they were last timed (`expected_seconds`), times the pace
    of this run so far; notebooks follow each other in order, wherever one of those that run
    `at_once` has ended.

    Args:
        expected: of every notebook that is to run, in order, the seconds of each code cell.
    """

    def __init__(
        self,
        expected: dict[str, list[float]],
        at_once: int = 1,
        clock: Callable = time.monotonic,
    ):
        self.expected, self.at_once, self.clock = expected, at_once, clock
        self.running: dict[str, Running] = {}
        self.spent = self.predicted = 0.0  # seconds of all cells that have ended, and expected ones

    def __enter__(self) -> Progress:
        console, self._shown = Console(), ExitStack()
        if console.is_terminal:
            show = {"console": console, "refresh_per_second": 1, "transient": True}
            lines = {"get_renderable": lambda: Text("\n".join(self.lines()))}
            self._shown.enter_context(Live(**lines, **show))
        else:
            ended = threading.Event()
            speaker = threading.Thread(target=self._speak_until, args=[ended], daemon=True)
            speaker.start()
            self._shown.callback(speaker.join)
            self._shown.callback(ended.set)  # before that
        return self

    def __exit__(self, *_) -> None:
        self._shown.close()

    def begin(self, name: str, label: str) -> None:
        """A notebook starts; `label` is what its lines begin with."""
        self.running[name] = Running(label, *[self.clock()] * 2)

    def cell_ends(self, name: str, **_) -> None:
        """A code cell has been executed (nbclient's hook `on_cell_executed`)."""
        own = self.running[name]
        seconds = self.clock() - own.cell_started
        self.spent += seconds
        self.predicted += self._expected_now(name, own)
        own.taken.append(seconds)
        own.cell_started += seconds

    def end(self, name: str) -> tuple[float, list[float]]:
        """The notebook has ended; returns its seconds, and those of its cells that ended."""
        del self.expected[name]  # first: another thread reads
        own = self.running.pop(name)
        return self.clock() - own.started, own.taken

    def left(self) -> tuple[dict[str, float], float]:
        """Seconds left of each notebook that runs, and of all."""
        now, running = self.clock(), {**self.running}  # another thread may change it
        cells = {
            name: (now - own.cell_started, self._expected_now(name, own))
            for name, own in running.items()
        }
        pace = (PRIOR + self.spent) / (PRIOR + self.predicted)
        # Cells that are late already: the pace is slower than it seemed.
        late = [cell for cell in cells.values() if cell[0] > pace * cell[1]]
        spent, predicted = (sum(part) for part in zip((0, 0), *late, strict=True))
        pace = (PRIOR + self.spent + spent) / (PRIOR + self.predicted + predicted)
        found = {}
        for name, (seconds, expected) in cells.items():
            behind = self.expected.get(name, [])[len(running[name].taken) + 1 :]
            found[name] = max(0.0, pace * expected - seconds) + pace * sum(behind)
        ends = [0.0] * (self.at_once - len(found)) + [*found.values()]
        heapify(ends)
        for name, own in [*self.expected.items()]:
            if name not in running:
                heapreplace(ends, ends[0] + pace * sum(own))
        return found, max(ends)

    def _expected_now(self, name: str, own: Running) -> float:
        """Seconds of the notebook's cell that runs."""
        left = self.expected.get(name, [])[len(own.taken) :]
        return left[0] if left else 0.0

    def lines(self) -> list[str]:
        """What is shown, a line a notebook that runs:
        `[3/10] 03_x: cell 9 of 25, 1 min 20 s, about 2 min left; whole: ...`."""
        running, (left, whole) = {**self.running}, self.left()
        said = []
        for name in filter(running.get, left):
            own, count = running[name], len(self.expected.get(name, []))
            spent = duration(self.clock() - own.started)
            cell = f"cell {min(len(own.taken) + 1, count)} of {count}"
            said.append(f"{own.label}: {cell}, {spent}, {about(left[name])}; whole: {about(whole)}")
        return said or [f"whole: {about(whole)}"]

    def _speak_until(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY):
            print(*self.lines(), sep="\n", flush=True)


def expected_seconds(profile: str, cells: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each code cell of each notebook, of which `cells` has the numbers: as they were
    when the profile last ran here, else as committed in `notebooks/profiles/seconds.json`."""
    committed = read_json(project_root() / "notebooks" / "profiles" / "seconds.json")
    known = committed.get(profile, {}) | read_json(recorded(profile))
    found = {}
    for name, count in cells.items():
        timed = known.get(name, [UNKNOWN])
        # Cells have come or gone since: what all of them take is still a guide.
        found[name] = timed if len(timed) == count else [sum(timed) / count] * count
    return found


def record_seconds(profile: str, name: str, taken: list[float]) -> None:
    """Keep the seconds of a notebook's cells for the next run's estimate."""
    known = read_json(recorded(profile)) | {name: [round(seconds, 1) for seconds in taken]}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known))
    write_atomically(recorded(profile), f"{{\n{lines}\n}}\n")


def about(seconds: float) -> str:
    """Time left, as exact as it can be known: `about 11 min left`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute left"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"about {hours}{minutes % 60} min left"


def recorded(profile: str) -> Path:
    """The file of what the profile's notebooks took when they last ran here."""
    return project_root() / "runs" / profile / "seconds.json"


def read_json(path: Path) -> dict:
    """What a file holds; nothing where there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): delete it") from None
