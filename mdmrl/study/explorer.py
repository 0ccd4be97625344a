"""A reward explorer: edit a completion, and each component moves and says why."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping

import pandas as pd

from mdmrl.rewards import reward_name, reward_values
from mdmrl.rewards.code import judge, programs_of
from mdmrl.rewards.medical import DEPTH_CAP, DEPTH_PER_BREAK, FORMAT_PER_TAG
from mdmrl.rewards.text import TAGS
from mdmrl.study.widgets import Interactive
from mdmrl.tasks.base import Task

FULL = 160  # pixels of a bar that stands for 1


def _tags(text: str, row: dict, value: float) -> str:
    missing = [tag for tag in TAGS if tag not in text]
    return f"{FORMAT_PER_TAG} a tag; missing: {', '.join(missing) or 'none'}"


def _breaks(text: str, row: dict, value: float) -> str:
    return f"{text.count(chr(10) * 2)} paragraph breaks, {DEPTH_PER_BREAK} each"


def _tests(text: str, row: dict, value: float | None) -> str:
    gap = ([row.get(name)] for name in ("signature", "prefix", "suffix"))
    (verdict,) = judge(programs_of([text], *gap), [row["tests"]])
    return f"{verdict.outcome} {verdict.detail}".strip()


# By a reward's name, what to say of its value: f(completion, row, value) -> text.
REASONS: dict[str, Callable[[str, dict, float | None], str]] = {
    "accuracy": lambda text, row, value: f"twice the cosine {value / 2:.2f} with the reference",
    "depth": _breaks,
    "capped_depth": lambda *given: f"{_breaks(*given)}, {DEPTH_CAP} at most",
    "format": _tags,
    "correctness_reward": _tests,
    "ast_reward": lambda text, row, value: f"{value:.0%} of the reference's subtrees are there",
    "reward": lambda *given: "the sum",
    "exact": lambda *given: "the true metric, never paid",
}


def scores(task: Task, row: dict, text: str) -> dict[str, float | None]:
    """What each reward of the task pays for a completion (None: it abstains), their sum `reward`,
    and the true metric, `exact`, which is never paid."""
    values = reward_values(task.rewards, [row["prompt"]], [text], [[]], [row])[0].tolist()
    paid = [None if value != value else value for value in values]
    found = dict(zip(map(reward_name, task.rewards), paid, strict=True))
    found["reward"] = sum(value for value in paid if value is not None)
    if task.metric is not None:
        right = task.metric(text, row)
        found["exact"] = None if right is None else float(right)
    return found


class Explorer(Interactive):
    """The rewards of a task on one row, for a completion that the reader writes.

    Args:
        text: to begin with. reasons: of rewards of your own, by name, as in `REASONS`.

    >>> Explorer(load_task("medcot"), row, "<answer>Gout</answer>")
    """

    def __init__(
        self, task: Task, row: dict, text: str, reasons: Mapping[str, Callable] | None = None
    ):
        self.task, self.row, self.text = task, row, text
        self.reasons = REASONS | dict(reasons or {})

    def table(self, text: str) -> pd.DataFrame:
        """A line for each of `scores`: its `value` and `why`."""
        lines = []
        for name, value in scores(self.task, self.row, text).items():
            known = self.reasons.get(name) if value is not None else None
            lines.append((name, value, known(text, self.row, value) if known else ""))
        return pd.DataFrame(lines, columns=["component", "value", "why"])

    def shown(self, text: str) -> str:
        """`table` as HTML, with bars."""
        rows = []
        for component, value, why in self.table(text).itertuples(index=False):
            known = value is not None and value == value
            colour = "#d55e00" if known and value < 0 else "#0173b2"
            width = round(min(abs(value), 3) * FULL) if known else 0
            bar = f"<div style='background:{colour};height:0.8em;width:{width}px'></div>"
            number = f"{value:.3g}" if known else "abstains"
            cells = (html.escape(component), number, bar, html.escape(why))
            rows.append("".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells))
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def widget(self):
        """The text to edit, and what it earns."""
        import ipywidgets

        text = ipywidgets.Textarea(self.text, rows=8, continuous_update=False)
        text.layout.width = "98%"
        view = ipywidgets.HTML(self.shown(self.text))
        text.observe(lambda change: setattr(view, "value", self.shown(change["new"])), "value")
        return ipywidgets.VBox([text, view])

    def _repr_html_(self) -> str:
        """The static twin: the text as it is given."""
        return f"<pre>{html.escape(self.text)}</pre>{self.shown(self.text)}"
