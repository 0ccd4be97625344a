"""A player of denoising trajectories: how texts appear, step by step.

Each position of a text stands where it will stand at the end; its shade says when it was revealed,
its opacity how sure the policy was, and what the step at hand revealed is framed. In JupyterLab a
slider and a play button move through the steps; where no front end listens (papermill, an export, a
page on GitHub) the same object shows five steps one above the other.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.sampling import SamplerOutput
from mdmrl.study.widgets import MASK_SHOWN, Interactive, shown_canvas

SHADES = colormaps["viridis"]
LEGEND = "shade: early (dark) to late (light); faint: unsure; framed: this step's"
BOX = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
STILLS = 5


class Player(Interactive):
    """Texts of one prompt or several, side by side.

    Args:
        outputs: what samplers gave with `record=True`, by name, or one of them; the slider runs to
            the longest, and the others rest at their end.
        row: which of the prompts. block_length: draws a bar between blocks.
        values: by name, what V said of the text before each step (nan: nothing).

    Raises:
        InputError: an output without a trajectory.

    >>> few, many = (generate(policy, [prompt], c, record=True) for c in (eight_steps, all_steps))
    >>> Player({"8 steps": few, "128 steps": many}, policy)
    """

    def __init__(
        self,
        outputs: SamplerOutput | Mapping[str, SamplerOutput],
        policy: Policy,
        row: int = 0,
        block_length: int | None = None,
        values: Mapping[str, Sequence[float]] | None = None,
    ):
        self.outputs = outputs if isinstance(outputs, Mapping) else {"": outputs}
        self.policy, self.row, self.block_length = policy, row, block_length
        self.values = values or {}
        for name, output in self.outputs.items():
            recorded = output.trajectory is not None
            require(recorded, f"{name or 'the output'} has no trajectory: draw it with record=True")
        self.steps = max(len(output.trajectory) for output in self.outputs.values())

    def frame(self, step: int) -> str:
        """HTML of all texts after so many steps."""
        texts = (self._text(name, output, step) for name, output in self.outputs.items())
        cells = "".join(f"<td style='vertical-align:top;text-align:left'>{x}</td>" for x in texts)
        return f"<table style='width:100%;table-layout:fixed'><tr>{cells}</tr></table>"

    def _text(self, name: str, output: SamplerOutput, step: int) -> str:
        done, row = min(step, len(output.trajectory)), self.row
        ids = torch.full_like(output.completion_ids[row], self.policy.mask_token_id)
        when, sure = torch.zeros(2, len(ids))
        for number, made in enumerate(output.trajectory[:done], start=1):
            again = made.remasked[1, made.remasked[0] == row]
            ids[again], when[again] = self.policy.mask_token_id, 0
            mine = made.rows == row
            at = made.positions[mine]
            ids[at], when[at], sure[at] = made.tokens[mine], number, made.logprobs[mine].exp().cpu()
        spans = []
        for i, piece in enumerate(shown_canvas(self.policy, ids.tolist())):
            if self.block_length and i and i % self.block_length == 0:
                spans.append("<span style='border-left:1px solid #999'></span>")
            spans.append(self._span(piece, int(when[i]), float(sure[i]), done, output))
        head = f"<b>{html.escape(name)}</b> step {done} of {len(output.trajectory)}"
        said = self.values.get(name)
        if said is not None and done and not np.isnan(said[done - 1]):
            head += f", V = {said[done - 1]:.2f}"
        return f"{head}<div style='{BOX}'>{''.join(spans)}</div>"

    def _span(self, piece: str, when: int, sure: float, done: int, output: SamplerOutput) -> str:
        shown = html.escape(piece)
        if piece == MASK_SHOWN or not when:
            return f"<span style='color:#bbb'>{shown}</span>"
        shade = to_hex(SHADES(0.85 * when / len(output.trajectory)))
        framed = "outline:1px solid #d55e00;" if when == done else ""
        style = f"color:{shade};opacity:{0.35 + 0.65 * sure:.2f};{framed}"
        title = f"step {when}, probability {sure:.2f}"
        return f"<span style='{style}' title='{title}'>{shown}</span>"

    def widget(self):
        """The slider, the play button and the text, linked."""
        import ipywidgets

        view = ipywidgets.HTML(self.frame(0))
        slider = ipywidgets.IntSlider(0, 0, self.steps, description="step")
        play = ipywidgets.Play(0, 0, self.steps, interval=150)
        ipywidgets.jslink((play, "value"), (slider, "value"))
        slider.observe(lambda change: setattr(view, "value", self.frame(change["new"])), "value")
        legend = ipywidgets.HTML(f"<small>{LEGEND}</small>")
        return ipywidgets.VBox([ipywidgets.HBox([play, slider]), view, legend])

    def _repr_html_(self) -> str:
        """The static twin."""
        stills = sorted({round(step) for step in np.linspace(0, self.steps, STILLS)})
        return "".join(map(self.frame, stills)) + f"<small>{LEGEND}</small>"
