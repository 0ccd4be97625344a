"""Which notebook writes a figure, of which tables, what draws it and what it says, by name.

A figure is drawn from what lies in `data/` beside it and from facts of its run, nothing else: in a
notebook, and again by `make figures`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mdmrl.config import unknown
from mdmrl.study.ledger import Claim, numbers


@dataclass(frozen=True)
class Drawing:
    """One figure of the study.

    Attributes:
        notebook: what writes it, and the tables that it is made of (`data/<table>.csv`).
        says: what is seen, in a sentence. A name in braces is that of a claim, whose number and
            interval stand there, or of what `known` makes of the tables.
        rows: of the claims that are judged, those whose evidence it shows.
        draw: `(facts, *tables) -> Figure`; facts are the notebook's parameters, "seeds" and
            "machine" among them.
    """

    notebook: str
    tables: tuple[str, ...]
    says: str
    draw: Callable[..., Figure]
    known: Callable[..., dict[str, str]] | None = None
    rows: tuple[int, ...] = ()

    def read(self, folder: Path) -> list[pd.DataFrame]:
        """Its tables, as they lie in `folder`, that of the figures."""
        return [pd.read_csv(folder / "data" / f"{table}.csv") for table in self.tables]

    def finding(self, folder: Path, claims: Mapping[str, Claim]) -> str:
        """What it says; where a claim of it has not been recorded yet, that this is so."""
        found = self.known(*self.read(folder)) if self.known else {}
        names = {*re.findall(r"{(\w+)}", self.says)} - {*found}
        if missing := sorted(names - {*claims}):
            return f"Not known yet: {', '.join(missing)}."
        return self.says.format(**found, **{name: numbers(claims[name]) for name in names})


FIGURES: dict[str, Drawing] = {}


def figure(notebook: str, *tables: str, says: str, known=None, rows: tuple[int, ...] = ()):
    """Registers what draws the figure of the function's name."""

    def register(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        FIGURES[draw.__name__] = Drawing(notebook, tables, says, draw, known, rows)
        return draw

    return register


def drawing(name: str) -> Drawing:
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    return FIGURES[name]
