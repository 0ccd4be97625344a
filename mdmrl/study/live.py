"""Runs as they go: a view of any run folder, and training in a thread, with stop and resume.

A view reads the run's files alone, so that any notebook shows any run: one that has not begun, one
that another process trains, one that is over. Training in a thread leaves the kernel free, so that
buttons are heard and the cells below can be run meanwhile.
"""

from __future__ import annotations

import copy
import html
import inspect
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mdmrl.policies import Policy
from mdmrl.progress import duration, viewed
from mdmrl.runs import Stopped, being_written, read_rows, request_stop
from mdmrl.study.widgets import Interactive, front_end

EVERY = 1.0  # seconds between two looks at the files
CURVES = ("reward", "eval/reward", "eval/accuracy", "accuracy", "eval/loss", "loss")
CURVES += ("loss/surrogate", "loss/kl", "kl", "values/loss", "entropy")
WIDTH, HEIGHT = 190, 56  # pixels of a curve
TEXTS, LONGEST = 3, 600  # completions that are shown, and characters of each


class Live(Interactive):
    """What a run has logged, updated in place: curves, the last completions, the time left.

    Its button stops the run after the update at hand, whoever trains it: `mdmrl.runs.request_stop`.

    Args:
        folder: of a run, which need not be there yet.
        make: makes or resumes the run; called in a thread by `start` and the button "resume".

    >>> Live("runs/grpo")
    """

    def __init__(self, folder: str | Path, make: Callable[[], object] | None = None):
        self.folder, self.make = Path(folder), make
        self.failed: BaseException | None = None  # how the thread ended
        self._thread: threading.Thread | None = None
        self._since: tuple[float, int] | None = None  # when it had so many rows

    def start(self) -> None:
        """Make the run, or go on with it."""

        def work() -> None:
            try:
                with viewed():
                    self.make()
            except BaseException as error:  # `wait` raises it where somebody sees it
                self.failed = error

        if self._thread is None or not self._thread.is_alive():
            self.failed, self._thread = None, threading.Thread(target=work, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask for a stop, which keeps the last finished update."""
        request_stop(self.folder)

    def wait(self) -> Path:
        """Wait for the run's end; returns its folder. Meanwhile the kernel hears no button; when it
        is interrupted the wait is over, and the run goes on.

        Raises:
            Stopped: it was stopped: resume it, and call this again. Or what else ended it.
        """
        if self._thread is not None:
            self._thread.join()
        if self.failed is not None:
            raise self.failed
        return self.folder

    @property
    def running(self) -> bool:
        return (self._thread is not None and self._thread.is_alive()) or being_written(self.folder)

    def shown(self) -> str:
        """HTML of what the run's files hold now."""
        rows, last = self._logged()
        drawn = [_curve(name, rows, last) for name in CURVES if any(name in row for row in rows)]
        samples = read_rows(self.folder / "samples.jsonl")[-1:]
        head = f"<b>{html.escape(self.folder.name)}</b>: {self._state(rows, last)}"
        box = "<div style='line-height:1.4;height:15em;overflow:auto'>"  # the cells below stay
        return f"{head}<div>{''.join(drawn)}</div>{box}{''.join(map(completions, samples))}</div>"

    def _logged(self) -> tuple[list[dict], int]:
        """The rows, and the number of updates asked for."""
        config = self.folder / "config.json"
        last = json.loads(config.read_text())["max_steps"] if config.exists() else 0
        return read_rows(self.folder / "metrics.jsonl"), last

    @property
    def complete(self) -> bool:
        rows, last = self._logged()
        return bool(rows) and rows[-1]["step"] == last

    def _state(self, rows: Sequence[dict], last: int) -> str:
        if rows and rows[-1]["step"] == last:
            return f"complete, {last} updates"
        done = rows[-1]["step"] + 1 if rows else 0
        so_far = f"{done} of {last} updates" if rows else "nothing has been logged yet"
        if self.running:
            return f"running, {so_far}" + self._left(rows, done, last)
        self._since = None
        if self.failed is not None and not isinstance(self.failed, Stopped):
            said = html.escape(f"{type(self.failed).__name__}: {self.failed}")
            return f"{so_far}; <span style='color:#d55e00'>{said}</span>"
        return f"stopped, {so_far}" if rows else so_far

    def _left(self, rows: Sequence[dict], done: int, last: int) -> str:
        """By the pace since this view began, looks at held-out prompts included, or at first by the
        seconds of the last updates."""
        now = time.monotonic()
        began, before = self._since = self._since or (now, done)
        recent = [row["step_time"] for row in rows[-10:] if row.get("step_time")]
        if done - before > 2:
            pace = (now - began) / (done - before)
        elif recent:
            pace = sum(recent) / len(recent)
        else:
            return ""
        return f", about {duration(pace * (last - done))} left"

    def widget(self):
        """The view and its buttons."""
        import ipywidgets

        view = ipywidgets.HTML(self.shown())
        stop, resume = (ipywidgets.Button(description=name) for name in ("stop", "resume"))
        stop.on_click(lambda _: self.stop())
        resume.on_click(lambda _: self.start())

        def follow() -> None:
            over = False
            while not over and view.comm is not None:  # else it was closed
                running, over = self.running, self.complete
                stop.disabled, resume.disabled = not running, running or over or self.make is None
                view.value = self.shown()
                time.sleep(EVERY)

        threading.Thread(target=follow, daemon=True).start()
        return ipywidgets.VBox([ipywidgets.HBox([stop, resume]), view])

    def _repr_html_(self) -> str:
        """The static twin: the run as it is now."""
        return self.shown()


def in_background(train: Callable[..., Path], policy: Policy, *given, **named) -> Live:
    """Call `train(policy, *given, **named)`, one of `train_grpo` and its like, in a thread, and
    show it; returns at once. Where nobody looks (papermill, a terminal) it returns when the run has
    ended, which says how far it is in lines.

    Other threads may sample from `policy` meanwhile: they get its turn between two updates.

    >>> live = in_background(train_grpo, policy, task.rewards, rows, config)
    >>> live  # in a notebook: the view; then, wherever the result is needed:
    >>> folder = live.wait()
    """
    config = inspect.signature(train).bind(policy, *given, **named).arguments["config"]
    frozen = {id(p): p for p in policy.model.parameters() if not p.requires_grad}  # not copied
    start, known_by = copy.deepcopy(policy.model, dict(frozen)), policy.weights_fingerprint()

    def make() -> None:
        if policy.weights_fingerprint() != known_by:  # a run is known by what it began with
            policy.model = copy.deepcopy(start, dict(frozen))
        train(policy, *given, **named)

    if not front_end():
        return Live(train(policy, *given, **named))
    live = Live(config.output_dir, make)
    live.start()
    return live


@contextmanager
def watched(folder: str | Path) -> Iterator[None]:
    """Show the run of that folder while this thread, the main one, makes it inside this context, if
    anybody looks; in the end one line. The kernel is busy and hears no button, but an interrupt,
    which stops the run after the update at hand; a second one is as ever."""
    main = threading.current_thread() is threading.main_thread()
    if not (main and front_end()):
        yield
        return
    import ipywidgets
    from IPython.display import HTML, display

    live, before = Live(folder), signal.getsignal(signal.SIGINT)
    _, view = live.widget().children
    note = "<small>Interrupt the kernel (■) to stop after the update at hand.</small>"
    handle = display(ipywidgets.VBox([ipywidgets.HTML(note), view]), display_id=True)

    def stop(*_) -> None:
        live.stop()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        with viewed():
            yield
    finally:
        signal.signal(signal.SIGINT, before)
        view.close()
        handle.update(HTML(live.shown().partition("<div")[0]))


def _curve(name: str, rows: Sequence[dict], last: int) -> str:
    """A column over the updates, with its range and newest value."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not points:
        return ""
    low, high = (bound(value for _, value in points) for bound in (min, max))
    across, up = (WIDTH - 4) / (last or 1), (HEIGHT - 4) / ((high - low) or 1)
    path = " ".join(f"{2 + across * x:.1f},{HEIGHT - 2 - up * (y - low):.1f}" for x, y in points)
    (x, y), size = map(float, path.split()[-1].split(",")), f"width='{WIDTH}' height='{HEIGHT}'"
    line = f"<polyline points='{path}' fill='none' stroke='#0173b2' stroke-width='1.5'/>"
    line += f"<circle cx='{x}' cy='{y}' r='2' fill='#0173b2'/>"
    head = f"{html.escape(name)} <b>{points[-1][1]:.3g}</b> <small>{low:.3g} to {high:.3g}</small>"
    style = "display:inline-block;margin:0 12px 6px 0;vertical-align:top"
    return f"<div style='{style}'>{head}<br><svg {size} style='background:#8881'>{line}</svg></div>"


def completions(sample: dict) -> str:
    """The newest group of completions, and what each earned."""
    prompt = sample["prompt"] if isinstance(sample["prompt"], str) else str(sample["prompt"])
    said = html.escape(prompt[:LONGEST])
    lines = [f"<tr><td colspan=2 style='text-align:left'><i>{said}</i></td></tr>"]
    for text, reward in list(zip(sample["completions"], sample["rewards"], strict=True))[:TEXTS]:
        earned = "-" if reward is None else f"{reward:.2f}"
        shown = html.escape(str(text)[:LONGEST])
        style = "text-align:left;white-space:pre-wrap;font-family:monospace"
        lines.append(f"<tr><td>{earned}</td><td style='{style}'>{shown}</td></tr>")
    return f"<table style='line-height:1.4'>{''.join(lines)}</table>"
