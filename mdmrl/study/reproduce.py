"""Headless reproduction: every notebook at one profile's scale."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock

import pandas as pd
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mdmrl.config import require, resolve
from mdmrl.progress import duration
from mdmrl.runs import write_atomically
from mdmrl.study import ledger
from mdmrl.study.notebooks import (
    code_cells,
    fingerprint,
    kernels,
    package_digest,
    plan,
    run_notebook,
)
from mdmrl.study.outputs import figures_folder, figures_of, profile_of, project_root, runs_folder
from mdmrl.study.progress import Progress, expected_seconds, read_json, record_seconds


def reproduce(
    profile: str = "cpu", only: Iterable[str] = (), force: bool = False, jobs: int = 1
) -> int:
    """Run the notebooks whose names begin with one of `only` ("03"), or all, at one profile's scale
    and print what came out; with `force` those too whose code, parameters and package have not
    changed since they last succeeded. `jobs` of them run at a time, and share the cores.

    Returns:
        the exit code: 1 if a notebook failed (its traceback is printed, the others still run), 130
        if Ctrl-C stopped it. An unknown profile, notebook or parameter is refused before any work.
    """
    only = list(only)
    named = (["--only", *only] if only else []) + _asked(jobs)
    return _until_stopped(lambda: _run(profile, only, force, jobs, {}), profile, *named)


def sweep(
    profile: str,
    only: Iterable[str],
    name: str,
    values: Sequence,
    force: bool = False,
    jobs: int = 1,
) -> int:
    """Run notebooks once for each of the `values` of their parameter `name`, and put the tables
    that they write, and their claims, one below the other, with a column `swept_<name>` in front,
    in `runs/<profile>/sweeps/<name>/`.

    Each value has a profile of its own, "cpu@beta=0.05", but for training runs, which are shared:
    what does not depend on the value is trained once.

    Returns:
        the exit code, as of `reproduce`.
    """
    only = list(only)
    require(bool(only and values), "a sweep needs notebooks and values: --only 04 --sweep beta=0,1")
    for value in values:
        plan(profile, only, {name: value})  # refused before any work

    def run() -> int:
        failed = [_run(profile, only, force, jobs, {name: value}) for value in values]
        print(*_collect(profile, name, values), sep="\n")
        return max(failed)

    asked = f"{name}={','.join(map(str, values))}"
    return _until_stopped(run, profile, "--only", *only, "--sweep", asked, *_asked(jobs))


def _run(profile: str, only: Sequence[str], force: bool, at_once: int, changes: Mapping) -> int:
    require(at_once > 0, f"--jobs {at_once}: expected at least 1 notebook at a time")
    jobs, place = plan(profile, only, changes), profile_of(profile, changes)
    folder = figures_folder(place)
    if place == "full":
        write_docs(folder)  # lacking markers show now, not at the end
    here, package = project_root() / "runs" / place, package_digest()
    prints = {path.stem: fingerprint(path, parameters, package) for path, parameters in jobs}
    outputs = {path.stem: here / "notebooks" / path.name for path, _ in jobs}
    done = {} if force else read_json(here / "done.json")
    unchanged = {
        name
        for name, output in outputs.items()
        if output.exists() and done.get(name) == [prints[name], *_count(name, folder)]
    }
    cells = {path.stem: code_cells(path) for path, _ in jobs if path.stem not in unchanged}
    writing, stopped = Lock(), Event()

    def execute(numbered: tuple[int, tuple[Path, Mapping]]) -> tuple:
        """The notebook's row of the summary."""
        number, (path, parameters) = numbered
        name, label = path.stem, f"[{number}/{len(jobs)}] {path.stem}"
        if name in unchanged:
            print(f"{label}: unchanged since it last ran", flush=True)
            return name, 0.0, *_count(name, folder), "unchanged"
        with writing:
            print(f"{label}: started", flush=True)
            _note(here / "done.json", name, None)
            progress.begin(name, label)
        ended = partial(progress.cell_ends, name)
        failure = run_notebook(path, outputs[name], parameters, ended)
        with writing:
            (seconds, taken), counts = progress.end(name), _count(name, folder)
            if failure and not stopped.is_set():
                print(f"{label}: failed after {duration(seconds)}\n{failure}", flush=True)
            elif not failure:
                print(f"{label}: done in {duration(seconds)}", flush=True)
                _note(here / "done.json", name, [prints[name], *counts])
                if not changes:
                    record_seconds(profile, name, taken)
        return name, seconds, *counts, "failed" if failure else "ok"

    with (
        Progress(expected_seconds(profile, cells), at_once) as progress,
        ThreadPoolExecutor(at_once) as pool,
        kernels(cells, at_once),
    ):
        try:
            rows = [*pool.map(execute, enumerate(jobs, 1))]
        except BaseException:
            stopped.set()
            raise
    _print_summary(place, rows)
    _print_ledger(ledger.load(folder / "claims.json"))
    if place == "full":
        write_docs(folder)
    return int(any(state == "failed" for *_, state in rows))


def _asked(jobs: int) -> list[str]:
    return ["--jobs", str(jobs)] if jobs > 1 else []


def _until_stopped(work: Callable[[], int], profile: str, *options: str) -> int:
    """The exit code of `work`; where Ctrl-C stops it 130, once it is said how to go on."""
    try:
        return work()
    except KeyboardInterrupt:
        words = ["mdmrl", "reproduce", "--profile", profile, *options]
        kept = "stopped; notebooks and training runs that ended are kept"
        print(f"{kept}. To go on: {shlex.join(words)}", flush=True)
        return 130


def _collect(profile: str, name: str, values: Sequence) -> list[Path]:
    """One table for each of those of the runs of a sweep."""
    found: dict[str, list[pd.DataFrame]] = {}
    for value in values:
        folder = figures_folder(profile_of(profile, {name: value}))
        tables = {path.stem: pd.read_csv(path) for path in sorted((folder / "data").glob("*.csv"))}
        claims = [claim.to_dict() for claim in ledger.load(folder / "claims.json")]
        for table, frame in ({"claims": pd.DataFrame(claims)} | tables).items():
            frame.insert(0, f"swept_{name}", [value] * len(frame))
            found.setdefault(table, []).append(frame)
    written = []
    for table, frames in found.items():
        written.append(runs_folder(profile) / "sweeps" / name / f"{table}.csv")
        write_atomically(written[-1], pd.concat(frames).to_csv(index=False))
    return written


def write_docs(folder: Path) -> None:
    """Put the tables of `folder`, that of the `full` figures, into the sections of `docs/`, and
    write the gallery of the figures."""
    from mdmrl.evaluation.tables import models_markdown
    from mdmrl.study.figures.gallery import gallery, pictures

    docs, models = project_root() / "docs", folder / "data" / "tiny_models.csv"
    ledger.fill_claims(docs / "results.md", folder / "claims.json", pictures(folder))
    write_atomically(project_root() / "figures" / "README.md", gallery(folder))
    if models.exists():
        ledger.fill_section(docs / "results.md", "models", models_markdown(models))
    for section, table in resolve("mdmrl.bench.tables:bench_tables")(folder / "data").items():
        ledger.fill_section(docs / "bench.md", section, table)


def _count(notebook: str, folder: Path) -> tuple[int, int]:
    """How many figures and claims of the notebook lie in `folder`."""
    claims = ledger.load(folder / "claims.json")
    return len(figures_of(notebook, folder)), sum(c.notebook == notebook for c in claims)


def _note(state: Path, name: str, entry: list | None) -> None:
    """Keep what is known of a notebook; another process may have noted others meanwhile."""
    others = {key: value for key, value in read_json(state).items() if key != name}
    others |= {name: entry} if entry else {}
    write_atomically(state, json.dumps(others, indent=1) + "\n")


def _print_summary(profile: str, rows: list[tuple]) -> None:
    numbers = (Column(name, justify="right") for name in ("seconds", "figures", "claims"))
    table = Table("notebook", *numbers, "ok", title=f"profile {profile}", title_justify="left")
    for name, seconds, figures, claims, state in rows:
        table.add_row(name, f"{seconds:.0f}", str(figures), str(claims), state)
    Console().print(table)


def _print_ledger(claims: list[ledger.Claim]) -> None:
    if claims:
        table = Table("claim", "verdict", "measured", title="claims", title_justify="left")
        for claim in claims:
            table.add_row(claim.id, claim.verdict, Text(ledger.sentence(claim)))
        Console().print(table)
