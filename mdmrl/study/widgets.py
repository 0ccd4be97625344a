"""What JupyterLab makes interactive, each with a static twin for headless runs."""

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from mdmrl.config import InputError
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


class Choices(Interactive):
    """What `show(**chosen)` says, HTML, of whatever is chosen.

    Args:
        begin: what is chosen first, by name; else the first option.
        options: by name, what can be chosen: numbers make a slider, a tuple a list of which any
            number is chosen, anything else a menu of one.

    >>> Choices(lambda power: f"{2**power}", power=[1, 2, 3])
    """

    def __init__(self, show: Callable[..., str], begin: Mapping | None = None, **options: Sequence):
        self.show, self.options = show, options
        firsts = (given[:1] if isinstance(given, tuple) else given[0] for given in options.values())
        self.begin = dict(zip(options, firsts, strict=True)) | dict(begin or {})

    def shown(self, **chosen) -> str:
        try:
            return self.show(**chosen)
        except InputError as error:  # the options do not go together
            return f"<i>{html.escape(str(error))}</i>"

    def widget(self):
        import ipywidgets

        view, controls = ipywidgets.HTML(self._repr_html_()), {}

        def update(_) -> None:
            chosen = {name: control.value for name, control in controls.items()}
            view.value = self.shown(**chosen)

        for name, given in self.options.items():
            kind, also = ipywidgets.Dropdown, {}
            if isinstance(given, tuple):
                kind, also = ipywidgets.SelectMultiple, {"layout": {"width": "95%"}}
            elif all(isinstance(option, int | float) for option in given):
                kind, also = ipywidgets.SelectionSlider, {"continuous_update": False}
            said = {
                "description": name.replace("_", " "),
                "style": {"description_width": "initial"},
            }
            controls[name] = kind(options=given, value=self.begin[name], **said, **also)
            controls[name].observe(update, "value")
        return ipywidgets.VBox([*controls.values(), view])

    def _repr_html_(self) -> str:
        """The static twin: what is shown first."""
        return self.shown(**self.begin)


def picture(figure: Figure) -> str:
    file = io.BytesIO()
    sns.despine(figure)
    figure.savefig(file, format="png", dpi=120)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img style='max-width:100%' src='data:image/png;base64,{data}'>"
