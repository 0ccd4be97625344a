"""What JupyterLab makes interactive, each with a static twin for headless runs."""

from __future__ import annotations

import os

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from mdmrl.policies import Policy
from mdmrl.sampling import SamplerOutput

MASK_SHOWN = "░"


def front_end() -> bool:
    """Whether somebody may look at what a notebook shows: JupyterLab and VS Code say so to their
    kernels, `mdmrl reproduce` to its own that nobody does, and papermill says nothing."""
    looked_at = {"JPY_SESSION_NAME", "VSCODE_PID"} & os.environ.keys()
    return bool(looked_at) and "MDMRL_NOTEBOOK" not in os.environ


class Interactive:
    """What `widget` makes where there is a front end, and `_repr_html_`, its static twin, for whom
    shows none: an export, a page on GitHub; under papermill the twin alone."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        live = self.widget()._repr_mimebundle_() if front_end() else {}
        return {**live, "text/html": self._repr_html_()}


def shown_canvas(policy: Policy, ids: list[int]) -> list[str]:
    """Token ids as text, one string a position, with `MASK_SHOWN` for the mask token."""
    pairs = zip(ids, policy.pieces(ids), strict=True)
    return [MASK_SHOWN if token == policy.mask_token_id else piece for token, piece in pairs]


def order_of_reveal(output: SamplerOutput, policy: Policy, row: int = 0) -> Figure:
    """When each position was revealed, and how sure the policy was."""
    frame = pd.concat(
        pd.DataFrame({"step": i, "position": s.positions[mine], "p": s.logprobs[mine].exp()})
        for i, s in enumerate(output.trajectory, start=1)
        for mine in [s.rows == row]
    )
    end = int(output.completion_mask[row].sum())
    figure, axes = plt.subplots(figsize=(6.3, 2.6), layout="constrained")
    shade = {"c": frame.p, "cmap": "viridis", "vmin": 0, "vmax": 1}
    points = axes.scatter(frame.position, frame.step, s=9, **shade)
    axes.axvline(end - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="position in the completion (dotted: its end)", ylabel="step of reveal")
    figure.colorbar(points, label="probability when revealed")
    return figure
