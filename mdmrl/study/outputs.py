"""Where a notebook's figures, tables and claims go, and the provenance beside each figure."""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from mdmrl.config import require
from mdmrl.evaluation.stats import Interval
from mdmrl.provenance import environment, machine, pick_device
from mdmrl.runs import write_atomically
from mdmrl.study import ledger
from mdmrl.study.parameters import check_injected
from mdmrl.study.verdicts import row_of

# No dates or versions inside the files: a re-run gives identical bytes.
FORMATS = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of the dates in fonts


def project_root() -> Path:
    """The checkout whose notebooks are run and whose folders are written, or `MDMRL_ROOT`."""
    folder = Path(os.environ.get("MDMRL_ROOT") or Path(__file__).parents[2]).resolve()
    require(
        (folder / "notebooks").is_dir(),
        f"{folder} has no notebooks folder: install the package from a checkout "
        "(pip install -e .) or set MDMRL_ROOT to one",
    )
    return folder


def profile_of(profile: str, changes: Mapping[str, object]) -> str:
    """The profile as it is called where parameters have other values: "cpu@beta=0.05"."""
    said = (f"@{name}={value}" for name, value in changes.items())
    return profile + re.sub(r"[^\w.+=@-]+", "_", "".join(said))


def runs_folder(profile: str) -> Path:
    """Where the training runs of a profile lie, which are the same with other values of parameters:
    a run is known by its settings."""
    return project_root() / "runs" / profile.partition("@")[0]


def figures_folder(profile: str) -> Path:
    """`figures/` for the `full` profile, `runs/<profile>/figures/` for any other."""
    require(
        re.fullmatch(r"[\w-]+(@[\w.=+-]+)*", profile) is not None,
        f"profile={profile!r}: expected letters, digits, '-' and '_' (it names a folder), perhaps "
        "with '@name=value' behind",
    )
    root = project_root()
    return root / "figures" if profile == "full" else root / "runs" / profile / "figures"


def figures_of(notebook: str, folder: Path) -> list[str]:
    """Names of the figures in `folder` that `notebook` wrote, by their provenance files."""
    known = (path.with_suffix(".json") for path in sorted(folder.glob("*.png")))
    beside = [path for path in known if path.exists()]
    return [path.stem for path in beside if json.loads(path.read_text())["notebook"] == notebook]


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `<name>.png` (200 dpi) and `<name>.pdf`, identical bytes for an identical figure."""
    for ending, metadata in FORMATS.items():
        aside = folder / f".{name}.{ending}"
        with rc_context({"pdf.fonttype": 42}):
            figure.savefig(aside, format=ending, dpi=200, metadata=metadata)
        os.replace(aside, folder / f"{name}.{ending}")
        figure.set_layout_engine("none")  # what the first has placed holds for the next


def _show_tables() -> None:
    """Where IPython shows what a cell ends with: frames and series with four digits a number, and
    without an index that only counts."""
    from IPython import get_ipython

    def shown(frame: pd.DataFrame) -> str:
        counts = frame.index.name is None and pd.api.types.is_integer_dtype(frame.index)
        return frame.to_html(index=not counts, float_format="{:.4g}".format, na_rep="", max_rows=60)

    if shell := get_ipython():
        html = shell.display_formatter.formatters["text/html"]
        html.for_type(pd.DataFrame, shown)
        html.for_type(pd.Series, lambda series: shown(series.to_frame(series.name or "")))


class Outputs:
    """What a notebook writes, to the folder of its profile: one object, made in its first cell,
    where it refuses a parameter that papermill was given and the notebook does not have, or has
    with another type.

    `notebook` is its name without ending, by default what `mdmrl reproduce` or JupyterLab says it
    is; give it where papermill is run by hand.
    """

    def __init__(self, profile: str, notebook: str | None = None):
        check_injected()
        _show_tables()
        named = os.environ.get("MDMRL_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME", "")
        self.profile, self.folder = profile, figures_folder(profile)
        self.notebook = notebook or Path(named).stem

    def figure(self, figure: Figure, name: str, seeds: Iterable[int] = (), **facts) -> Path:
        """Write `<name>.png` (200 dpi), `<name>.pdf` and `<name>.json`; returns the PNG's path.

        The JSON holds notebook, profile, seeds, versions, machine, revision, the command that
        writes the figure again, and any further `facts` (the runs drawn, say).
        """
        path = self._path(self.folder, name, "json")
        save(figure, self.folder, name)
        origin = {"notebook": self.notebook, "profile": self.profile, "seeds": list(seeds)}
        known = {**facts, **origin, **environment(pick_device())}
        if "MDMRL_NOTEBOOK" in os.environ:  # else run by hand, maybe with parameters of its own
            profile, swept, change = self.profile.partition("@")
            command = f"mdmrl reproduce --profile {profile} --only {self.notebook}"
            known["command"] = f"{command} --sweep {change}" if swept else command
        write_atomically(path, json.dumps(known, indent=1) + "\n")
        return path.with_suffix(".png")

    def draw(self, name: str, seeds: Iterable[int] = (), **facts) -> Path:
        """Draw the figure of that name (`mdmrl.study.figures`) from the tables which the notebook
        wrote, and write it; `facts` are those that it takes, and any further ones."""
        from mdmrl.study.figures import drawing

        of = drawing(name)
        known = {"seeds": list(seeds), "machine": machine(pick_device()), **facts}
        return self.figure(of.draw(known, *of.read(self.folder)), name, seeds, **facts)

    def data(self, frame: pd.DataFrame, name: str) -> None:
        """Write the frame's columns to `data/<name>.csv`, its index left out."""
        path = self._path(self.folder / "data", name, "csv")
        write_atomically(path, frame.to_csv(index=False, lineterminator="\n"))

    def claim(self, claim: ledger.Claim) -> ledger.Claim:
        """Record the claim with this notebook and profile; returns it so completed."""
        claim = claim.replace(notebook=self.notebook, profile=self.profile)
        ledger.record(claim, self.folder)
        return claim

    def judge(self, row: int, line: str, *columns, **facts) -> str:
        """Record what the rule of a row makes of the columns and facts that it takes, for one of
        the row's lines; returns it in words, before any correction for the number of claims."""
        claim = row_of(row)
        claim.require_line(line)
        verdict = claim.rule(*columns, **facts)
        known = {"id": f"row_{row:02}_{ledger.slug(line)}", "says": claim.says, "row": row}
        known |= {"where": claim.where, "line": line, "unit": claim.unit}
        self.claim(ledger.Claim(**known, **asdict(verdict)))
        return f"{verdict.verdict}: {verdict.measured}"

    def measure(
        self,
        id: str,
        says: str,
        where: str,
        measured: str,
        interval: Interval | None = None,
        seeds: int = 0,
        unit: str = "",
    ) -> str:
        """Record what was measured and no rule judges; returns it in words."""
        ends = [x if math.isfinite(x) else None for x in interval or ()] or [None] * 3
        numbers = dict(zip(("estimate", "low", "high"), ends, strict=True))
        known = {"id": id, "says": says, "where": where, "measured": measured, "seeds": seeds}
        claim = ledger.Claim(**known, **numbers, unit=unit, verdict="measured")
        self.claim(claim)
        return ledger.sentence(claim)

    def found(self) -> object:
        """What this notebook has claimed so far, as the page of results shows it."""
        from IPython.display import Markdown

        from mdmrl.study.figures.gallery import pictures

        own = [c for c in ledger.load(self.folder / "claims.json") if c.notebook == self.notebook]
        text = ledger.render(own, pictures(self.folder), whole=False)
        if "MDMRL_NOTEBOOK" not in os.environ:  # else beside the figures, in runs/PROFILE/notebooks
            figures = os.path.relpath(self.folder, project_root() / "notebooks")
            text = text.replace('"../figures/', f'"{Path(figures).as_posix()}/')
        return Markdown(text)

    @staticmethod
    def _path(folder: Path, name: str, ending: str) -> Path:
        require(
            re.fullmatch(r"[a-z0-9_]+", name) is not None and name != "claims",
            f"name={name!r}: expected small letters, digits and '_', as in 'fig_4_1_reward' "
            "('claims' is the ledger's)",
        )
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.{ending}"
