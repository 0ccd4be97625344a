"""How far a reproduction has come, and about how long it will still take."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mdmrl.progress import duration
from mdmrl.runs import write_atomically
from mdmrl.study.outputs import project_root

EVERY = 8.0  # seconds between lines where there is no terminal
UNKNOWN = 60.0  # seconds of a notebook that nobody has timed
PRIOR = 30.0  # seconds for which this machine is taken to be as fast as the one that was timed


class Progress:
    """Says which cell of which notebook runs and how long is left: one line that changes on a
    terminal, elsewhere a line at least every 10 s.

    The time left is what cells took when they were last timed (`expected_seconds`), times the pace
    of this run so far.

    Args:
        expected: of every notebook that is to run, in order, the seconds of each code cell.
    """

    def __init__(self, expected: dict[str, list[float]], clock: Callable = time.monotonic):
        self.expected, self.clock = expected, clock
        self.label, self.name = "", ""
        self.taken: list[float] = []  # seconds of this notebook's cells, those that have ended
        self.started = self.cell_started = clock()
        self.spent = self.predicted = 0.0  # seconds of all cells that have ended, and expected ones

    def __enter__(self) -> Progress:
        console, self._shown = Console(), ExitStack()
        if console.is_terminal:
            show = {"console": console, "refresh_per_second": 1, "transient": True}
            self._shown.enter_context(Live(get_renderable=lambda: Text(self.line()), **show))
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
        self.name, self.label, self.taken = name, label, []
        self.started = self.cell_started = self.clock()

    def cell_ends(self, **_) -> None:
        """A code cell has been executed (nbclient's hook `on_cell_executed`)."""
        seconds = self.clock() - self.cell_started
        self.spent += seconds
        self.predicted += self._expected_now()
        self.taken.append(seconds)
        self.cell_started += seconds

    def end(self) -> float:
        """The notebook has ended; returns its seconds."""
        name, self.name = self.name, ""  # first: another thread reads
        del self.expected[name]
        return self.clock() - self.started

    def left(self) -> tuple[float, float]:
        """Seconds left of this notebook, and of all."""
        running, now = self.clock() - self.cell_started, self._expected_now()
        pace = (PRIOR + self.spent) / (PRIOR + self.predicted)
        if running > pace * now:  # late already: the pace is slower than it seemed
            pace = (PRIOR + self.spent + running) / (PRIOR + self.predicted + now)
        behind = self.expected.get(self.name, [])[len(self.taken) + 1 :]
        notebook = max(0.0, pace * now - running) + pace * sum(behind)
        others = sum(sum(own) for name, own in [*self.expected.items()] if name != self.name)
        return notebook, notebook + pace * others

    def _expected_now(self) -> float:
        """Seconds of the cell that runs."""
        left = self.expected.get(self.name, [])[len(self.taken) :]
        return left[0] if left else 0.0

    def line(self) -> str:
        """What is shown: `[3/10] 03_x: cell 9 of 25, 1 min 20 s, about 2 min left; whole: ...`."""
        notebook, whole = self.left()
        count, spent = len(self.expected.get(self.name, [])), duration(self.clock() - self.started)
        if not count:
            return f"whole: {about(whole)}"
        where = f"{self.label}: cell {min(len(self.taken) + 1, count)} of {count}"
        return f"{where}, {spent}, {about(notebook)}; whole: {about(whole)}"

    def _speak_until(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY):
            print(self.line(), flush=True)


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
    return json.loads(path.read_text()) if path.exists() else {}
