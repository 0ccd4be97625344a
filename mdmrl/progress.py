"""How far a run has come: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SILENT = 8.0  # most seconds between two lines, updates permitting
SHOWN = ("reward", "loss", "kl", "eval/accuracy", "accuracy")


class Progress:
    """Shows the updates of the run `name` as they finish, or what else is its `unit`, `first` being
    done before and `last` in all; nothing unless `shown`."""

    def __init__(self, name: str, first: int, last: int, shown: bool = True, unit: str = "update"):
        self.name, self.first, self.last = name, first, last
        self.shown, self.unit = shown, unit
        self.start = time.monotonic()
        self.said = self.start - SILENT
        self.bar = None
        if shown and sys.stderr.isatty():
            shown_as = {"desc": name, "unit": unit, "unit_scale": last > 10**6}
            self.bar = tqdm(total=last, initial=first, **shown_as)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int, metrics: dict) -> None:
        """`done` of them are finished, the last with these metrics."""
        found = {k: f"{metrics[k]:.4g}" for k in SHOWN if metrics.get(k) is not None}
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(found, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.shown and (now - self.said >= SILENT or done == self.last):
            self.said = now
            left = (now - self.start) / (done - self.first) * (self.last - done)
            what = [f"{name} {value}" for name, value in found.items()]
            # A notebook shows what goes to stderr as an error, a shell's pipe wants results alone.
            where = sys.stdout if in_a_notebook() else sys.stderr
            said = [f"{self.name}: {self.unit} {done:,} of {self.last:,}", *what]
            print(", ".join([*said, f"{duration(left)} left"]), file=where)


def in_a_notebook() -> bool:
    """Whether this process is IPython's, as a notebook's kernel is."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min 20 s", "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
