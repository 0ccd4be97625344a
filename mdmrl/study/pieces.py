"""Results that take long, each computed once.

A piece is one table. It is known by its identity: settings, weights, rows, the version of the
algorithm. That decides the law of the result; its bits also depend on the machine (a card draws
other random numbers) and on the revision of the sources. It lies as a CSV, beside it a JSON with
the identity, machine and revision (early ones name no machine) and what else is to be known, in
`figures/data/runs` for the `full` profile (committed) and in `runs/<profile>/runs` for any other; a
piece whose identity lies there is not computed again. Its name, a readable slug and a hash, is a
name only, so that a setting that is added later orphans nothing.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import pandas as pd
from filelock import FileLock

from mdmrl.identity import described, digest
from mdmrl.provenance import machine, pick_device, revision
from mdmrl.runs import as_json, filled, write_atomically
from mdmrl.study.outputs import figures_folder, runs_folder


def cached_table(
    profile: str,
    slug: str,
    identity: Mapping,
    compute: Callable[[str], tuple[pd.DataFrame, dict]],
    since: Mapping | None = None,
) -> pd.DataFrame:
    """The table that `compute` makes, or the one that an earlier call of the same identity left: as
    its CSV has it (six digits), with the piece's name in a column `run`.

    Args:
        compute: takes the piece's name; returns the table, and what the JSON is to hold.
        since: values of what the identity of an older piece does not name yet.
    """
    if (kept := kept_table(profile, slug, identity, since)) is not None:
        return kept
    wanted = json.loads(as_json(identity))
    path = pieces_folder(profile) / f"{slug}-{digest(described(wanted))}.csv"
    lock = runs_folder(profile) / "locks" / f"{path.stem}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # of two notebooks one computes it, and the other waits
        if (kept := kept_table(profile, slug, identity, since)) is not None:
            return kept
        made_on = {"machine": machine(pick_device()), "revision": revision()}
        table, known = compute(path.stem)  # hours, in which the sources may change
        text = as_json(known | {"identity": identity, **made_on}, indent=1)
        write_atomically(path, table.to_csv(index=False, float_format="%.6g"))
        write_atomically(path.with_suffix(".json"), text + "\n")  # last: without it no piece
    return read_table(path)


def kept_table(
    profile: str, slug: str, identity: Mapping, since: Mapping | None = None
) -> pd.DataFrame | None:
    """The table that an earlier `cached_table` of the same arguments left, None without one."""
    wanted = json.loads(as_json(identity))
    for path in sorted(pieces_folder(profile).glob(f"{slug}-??????????.json")):
        if filled(_identity(path), since or {}) == wanted:
            return read_table(path.with_suffix(".csv"))
    return None


@lru_cache(maxsize=1024)
def _identity(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")).get("identity", {})


def read_table(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    return table.assign(run=path.stem)


def facts(profile: str, run: str) -> dict:
    """The JSON of the piece of that name."""
    return json.loads((pieces_folder(profile) / f"{run}.json").read_text())


def pieces_folder(profile: str) -> Path:
    if profile == "full":
        return figures_folder(profile) / "data" / "runs"
    return runs_folder(profile) / "runs"
