"""Headless reproduction: every notebook at one profile's scale, through papermill."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdmrl.config import InputError, require, unknown
from mdmrl.runs import write_atomically
from mdmrl.study import ledger
from mdmrl.study.outputs import figures_folder, figures_of, project_root

PACKAGE = Path(__file__).parents[1]


@dataclass
class Result:
    """How one notebook came out: `state` is ok, unchanged or failed."""

    notebook: str
    seconds: float
    figures: int
    claims: int
    state: str


def reproduce(profile: str = "cpu", only: Iterable[str] = (), force: bool = False) -> int:
    """Run the notebooks at one profile's scale and print what came out.

    Args:
        profile: a file of `notebooks/profiles/`.
        only: beginnings of notebook names ("03"); all notebooks if empty.
        force: run those again whose code, parameters and package have not changed since they
            last succeeded.

    Returns:
        The exit code: 1 if a notebook failed (its traceback is printed, the others still run).

    Raises:
        ValueError: before any work, for an unknown profile, notebook or parameter.
    """
    root = project_root()
    jobs = plan(profile, only)
    folder, claims = figures_folder(profile), figures_folder(profile) / "claims.json"
    if profile == "full":
        ledger.update_readme(root / "README.md", claims)  # lacking markers show now, not at the end
    state, package = root / "runs" / profile / "done.json", _package_digest()

    results = []
    for number, (path, parameters) in enumerate(jobs, 1):
        name, label = path.stem, f"[{number}/{len(jobs)}] {path.stem}"
        output = root / "runs" / profile / "notebooks" / path.name
        fingerprint = _fingerprint(path, parameters, package)
        done = _read(state)
        if not force and output.exists() and done.get(name) == [fingerprint, *_count(name, folder)]:
            print(f"{label}: unchanged since it last ran", flush=True)
            results.append(Result(name, 0.0, *_count(name, folder), "unchanged"))
            continue

        print(f"{label}: started", flush=True)
        start = time.monotonic()
        failure = run_notebook(path, output, parameters)
        seconds = time.monotonic() - start
        counts = _count(name, folder)
        if failure:
            print(f"{label}: failed after {seconds:.0f} s\n{failure}", flush=True)
        else:
            print(f"{label}: done in {seconds:.0f} s", flush=True)
        # Read again: another process may have finished a notebook meanwhile.
        done = {key: value for key, value in _read(state).items() if key != name}
        if not failure:
            done[name] = [fingerprint, *counts]
        write_atomically(state, json.dumps(done, indent=1) + "\n")
        results.append(Result(name, seconds, *counts, "failed" if failure else "ok"))

    _print_summary(profile, results)
    _print_ledger(ledger.load(claims))
    if profile == "full":
        ledger.update_readme(root / "README.md", claims)
        if (models := folder / "data" / "tiny_models.csv").exists():
            from mdmrl.evaluation.tables import models_markdown

            ledger.fill_section(root / "README.md", "models", models_markdown(models))
        if list((folder / "data").glob("bench_samplers*.json")):
            from mdmrl.bench.samplers import bench_markdown

            ledger.fill_section(root / "README.md", "bench", bench_markdown(folder / "data"))
    return int(any(result.state == "failed" for result in results))


def plan(profile: str, only: Iterable[str] = ()) -> list[tuple[Path, dict]]:
    """The notebooks to run, in order, each with its parameters at this profile's scale.

    Raises:
        ValueError: an unknown profile or notebook, a notebook that the profile leaves out, or a
            parameter that the notebook does not have (papermill would only warn).
    """
    settings = load_profile(profile)
    notebooks = {path.stem: path for path in sorted((project_root() / "notebooks").glob("*.ipynb"))}
    for name in settings:
        if name not in notebooks:
            raise unknown(f"notebook in {profile}.yaml", name, notebooks)
    only = list(only)
    for beginning in only:
        if not any(name.startswith(beginning) for name in notebooks):
            raise unknown("notebook", beginning, notebooks)
    jobs = []
    for name, path in notebooks.items():
        if only and not name.startswith(tuple(only)):
            continue
        require(name in settings, f"{profile}.yaml leaves out {name}: add its parameters, or {{}}")
        parameters = {**settings[name], "profile": profile}
        known = notebook_parameters(path)
        for parameter in parameters:
            if parameter not in known:
                raise unknown(f"parameter of {name} in {profile}.yaml", parameter, known)
        jobs.append((path, parameters))
    return jobs


def load_profile(name: str) -> dict[str, dict]:
    """`notebooks/profiles/<name>.yaml`: the parameters of each notebook.

    Raises:
        ValueError: no such profile, or a file of another shape.
    """
    folder = project_root() / "notebooks" / "profiles"
    known = [path.stem for path in folder.glob("*.yaml")]
    if name not in known:
        raise unknown("profile", name, known)
    try:
        settings = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{name}.yaml: {error}") from error
    require(
        isinstance(settings, Mapping)
        and all(isinstance(value, Mapping | None) for value in settings.values()),
        f"{name}.yaml: expected notebook names, each with a mapping of its parameters",
    )
    return {notebook: dict(parameters or {}) for notebook, parameters in settings.items()}


def notebook_parameters(path: Path) -> dict[str, object]:
    """The names that a notebook's parameters cell assigns, with their values.

    Raises:
        ValueError: no such cell, several, or one with more in it than names set to literals.
    """
    cells = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    require(
        len(cells) == 1, f"{path.name}: {len(cells)} cells are tagged 'parameters', expected one"
    )
    values = {}
    for statement in ast.parse(cells[0].source).body:
        try:
            target = statement.target if isinstance(statement, ast.AnnAssign) else None
            target = target or statement.targets[0]
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            raise InputError(
                f"{path.name}: '{ast.unparse(statement)}' in the parameters cell: "
                "expected one name set to a literal; compute in the next cell"
            ) from None
    return values


def run_notebook(path: Path, output: Path, parameters: Mapping) -> str:
    """Execute a notebook in this interpreter; returns the failure's plain text, "" for success.

    The executed copy is written to `output` in either case.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with _kernel(path.stem):
        try:
            papermill.execute_notebook(
                path,
                output,
                dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=path.parent,
            )
        except papermill.PapermillExecutionError as error:
            return str(error)  # the cell's traceback, without colours
        except Exception as error:  # a dead kernel, say: the other notebooks still run
            return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _kernel(notebook: str) -> Iterator[None]:
    """Let `python3` name a kernel in this very interpreter, with this very package.

    Whatever kernels are registered, or none, and whatever the user's IPython starts with.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "argv": [
                *(sys.executable, "-m", "ipykernel_launcher"),
                *("-f", "{connection_file}", "--log-level=ERROR"),
            ],
            "display_name": "mdmrl",
            "language": "python",
            "env": {
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])
                ),
                "IPYTHONDIR": folder,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
                "MDMRL_NOTEBOOK": notebook,
            },
        }
        write_atomically(Path(folder, "kernels", "python3", "kernel.json"), json.dumps(spec))
        ours = {"JUPYTER_PATH": folder, "JUPYTER_RUNTIME_DIR": str(Path(folder, "runtime"))}
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


def _package_digest() -> str:
    """Changes with any file of the package, its tables and checkpoints included."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(PACKAGE)} {content}\n".encode())
    return digest.hexdigest()


def _fingerprint(path: Path, parameters: Mapping, package: str) -> str:
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    text = json.dumps([cells, parameters, package], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _count(notebook: str, folder: Path) -> tuple[int, int]:
    """How many figures and claims of the notebook lie in `folder`."""
    claims = ledger.load(folder / "claims.json")
    return len(figures_of(notebook, folder)), sum(c.notebook == notebook for c in claims)


def _read(state: Path) -> dict[str, list]:
    return json.loads(state.read_text()) if state.exists() else {}


def _print_summary(profile: str, results: list[Result]) -> None:
    table = Table("notebook", title=f"profile {profile}", title_justify="left")
    for column in ("seconds", "figures", "claims"):
        table.add_column(column, justify="right")
    table.add_column("ok")
    for row in results:
        numbers = (f"{row.seconds:.0f}", str(row.figures), str(row.claims))
        table.add_row(row.notebook, *numbers, row.state)
    Console().print(table)


def _print_ledger(claims: list[ledger.Claim]) -> None:
    if claims:
        table = Table("claim", "verdict", "measured", title="claims", title_justify="left")
        for claim in claims:
            measured = ledger.cells(claim)[ledger.COLUMNS.index("Measured here")]
            table.add_row(claim.id, claim.verdict, Text(measured))
        Console().print(table)
