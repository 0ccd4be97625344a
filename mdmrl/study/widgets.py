"""What JupyterLab makes interactive, each with a static twin for headless runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from mdmrl.policies import Policy
from mdmrl.runs import read_rows
from mdmrl.sampling import SamplerOutput

MASK_SHOWN = "░"


class Interactive:
    """What `widget` makes in JupyterLab, and `_repr_html_`, its static twin, for whom shows none:
    an export, a page on GitHub; under `mdmrl reproduce` the twin alone."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        live = {} if "MDMRL_NOTEBOOK" in os.environ else self.widget()._repr_mimebundle_()
        return {**live, "text/html": self._repr_html_()}


def shown_canvas(policy: Policy, ids: list[int]) -> list[str]:
    """Token ids as text, one string a position, with `MASK_SHOWN` for the mask token."""
    pairs = zip(ids, policy.pieces(ids), strict=True)
    return [MASK_SHOWN if token == policy.mask_token_id else piece for token, piece in pairs]


def reveals(output: SamplerOutput, row: int = 0) -> pd.DataFrame:
    """When each position of a completion was revealed (`step`, from 1), how probable its token was
    then (`p`), and whether it `counts`, up to the first end token."""
    steps = (
        pd.DataFrame({"step": i, "position": s.positions[mine], "p": s.logprobs[mine].exp()})
        for i, s in enumerate(output.trajectory, start=1)
        for mine in [s.rows == row]
    )
    frame = pd.concat(steps, ignore_index=True)
    return frame.assign(counts=output.completion_mask[row].cpu().numpy()[frame.position])


def live_curve(folder: str | Path, column: str = "reward", seconds: float = 0.0) -> None:
    """Draw a run's curve from its folder, and again each second while `seconds` last.

    Reads files only, so any notebook or kernel can watch any run; a finished one is drawn once, and
    one that has logged nothing yet is an empty axis that says so.
    """
    from IPython.display import display

    folder, deadline = Path(folder), time.monotonic() + seconds
    last = json.loads((folder / "config.json").read_text())["max_steps"]
    handle = display(display_id=True)
    while True:
        rows = read_rows(folder / "metrics.jsonl")
        frame = pd.DataFrame(rows, columns=["step", column], dtype=float)
        figure, axes = plt.subplots(figsize=(6.3, 2.2), layout="constrained")
        title = folder.name if rows else f"{folder.name}: nothing has been logged yet"
        axes.set(xlabel="update", ylabel=column, title=title)
        axes.plot(frame.step, frame[column], marker=".", linewidth=1)
        plt.close(figure)
        handle.update(figure)
        if frame.step.max() >= last or time.monotonic() >= deadline:
            return
        time.sleep(1)
