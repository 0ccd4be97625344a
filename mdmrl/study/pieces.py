"""Results that take long, each computed once.

A piece is one table. Its name is a readable slug and a hash of its identity: settings, weights,
rows, the version of the algorithm. That decides the law of the result; its bits also depend on the
machine (a card draws other random numbers) and on the revision of the sources. It lies as a CSV,
beside it a JSON with the identity, machine and revision (early ones lack some of these) and what
else is to be known, in `figures/data/runs` for the `full` profile (committed) and in
`runs/<profile>/runs` for any other; a piece whose CSV is there is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mdmrl.provenance import machine, pick_device, revision
from mdmrl.runs import config_hash, write_atomically
from mdmrl.study.outputs import figures_folder, project_root


def cached_table(
    profile: str, slug: str, identity: dict, compute: Callable[[str], tuple[pd.DataFrame, dict]]
) -> pd.DataFrame:
    """The table that `compute` makes, or the one that an earlier call of the same identity left.

    Args:
        compute: takes the piece's name; returns the table, and what the JSON is to hold.
    Returns:
        the table as its CSV has it (six digits), with the piece's name in a column `run`.
    """
    path = pieces_folder(profile) / f"{slug}-{config_hash(identity)}.csv"
    if not path.exists():
        made_on = {"machine": machine(pick_device()), "revision": revision()}
        made_by = {"identity": identity, **made_on}
        table, known = compute(path.stem)  # hours, in which the sources may change
        write_atomically(path.with_suffix(".json"), json.dumps(known | made_by, indent=1) + "\n")
        write_atomically(path, table.to_csv(index=False, float_format="%.6g"))
    return read_table(path)


def read_table(path: Path) -> pd.DataFrame:
    """The table of a piece's CSV."""
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    return table.assign(run=path.stem)


def facts(profile: str, run: str) -> dict:
    """The JSON of the piece of that name."""
    return json.loads((pieces_folder(profile) / f"{run}.json").read_text())


def pieces_folder(profile: str) -> Path:
    """Where pieces lie."""
    if profile == "full":
        return figures_folder(profile) / "data" / "runs"
    return project_root() / "runs" / profile / "runs"
