"""How far a reproduction has come, and about how long it will still take."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

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
        self._ended = threading.Event()
        self._speaker = threading.Thread(target=self._speak, daemon=True)
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        console = Console()
        if console.is_terminal:
            show = {"refresh_per_second": 1, "transient": True}
            self._live = Live(get_renderable=lambda: Text(self.line()), console=console, **show)
            self._live.start()
        else:
            self._speaker.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()
        else:
            self._ended.set()
            self._speaker.join()

    def begin(self, name: str, label: str) -> None:
        """A notebook starts; `label` is what its lines begin with."""
        self.name, self.label, self.taken = name, label, []
        self.started = self.cell_started = self.clock()

    def cell_ends(self, **_) -> None:
        """A code cell has been executed (nbclient's hook `on_cell_executed`)."""
        now = self.clock()
        seconds, at = now - self.cell_started, len(self.taken)
        cells = self.expected[self.name]
        self.spent += seconds
        self.predicted += cells[at] if at < len(cells) else 0.0
        self.taken, self.cell_started = [*self.taken, seconds], now

    def end(self) -> float:
        """The notebook has ended; returns its seconds."""
        del self.expected[self.name]
        self.name = ""
        return self.clock() - self.started

    def left(self) -> tuple[float, float]:
        """Seconds left of this notebook, and of all."""
        cells, at = self.expected.get(self.name, []), len(self.taken)
        running = self.clock() - self.cell_started
        now = cells[at] if at < len(cells) else 0.0
        pace = (PRIOR + self.spent) / (PRIOR + self.predicted)
        if running > pace * now:  # late already: the pace is slower than it seemed
            pace = (PRIOR + self.spent + running) / (PRIOR + self.predicted + now)
        notebook = max(0.0, pace * now - running) + pace * sum(cells[at + 1 :])
        others = sum(sum(own) for name, own in self.expected.items() if name != self.name)
        return notebook, notebook + pace * others

    def line(self) -> str:
        """What is shown: `[3/10] 03_x: cell 9 of 25, 1 min 20 s, about 2 min left; whole: ...`."""
        notebook, whole = self.left()
        if not self.name:
            return f"whole: {about(whole)}"
        count = len(self.expected[self.name])
        cell = min(len(self.taken) + 1, count)
        return (
            f"{self.label}: cell {cell} of {count}, {clock_time(self.clock() - self.started)}, "
            f"{about(notebook)}; whole: {about(whole)}"
        )

    def _speak(self) -> None:
        while not self._ended.wait(EVERY):
            print(self.line(), flush=True)


def expected_seconds(profile: str, cells: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each code cell of each notebook, of which `cells` has the numbers: as they were
    when the profile last ran here, else as committed in `notebooks/profiles/seconds.json`."""
    committed = _read(project_root() / "notebooks" / "profiles" / "seconds.json").get(profile, {})
    known = committed | _read(_recorded(profile))
    found = {}
    for name, count in cells.items():
        timed = known.get(name, [UNKNOWN])
        # Cells have come or gone since: what all of them take is still a guide.
        found[name] = timed if len(timed) == count else [sum(timed) / count] * count
    return found


def record_seconds(profile: str, name: str, taken: list[float]) -> None:
    """Keep the seconds of a notebook's cells for the next run's estimate."""
    known = _read(_recorded(profile)) | {name: [round(seconds, 1) for seconds in taken]}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known))
    write_atomically(_recorded(profile), f"{{\n{lines}\n}}\n")


def about(seconds: float) -> str:
    """Time left, as exact as it can be known: `about 11 min left`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute left"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"about {hours}{minutes % 60} min left"


def clock_time(seconds: float) -> str:
    """Time spent: `1 min 20 s`."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _recorded(profile: str) -> Path:
    return project_root() / "runs" / profile / "seconds.json"


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
