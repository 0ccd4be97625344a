"""Notebooks with the parameters of a profile, and their execution through papermill."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import yaml

from mdmrl.config import InputError, require, unknown
from mdmrl.runs import write_atomically
from mdmrl.study.outputs import project_root

PACKAGE = Path(__file__).parents[1]


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


def code_cells(path: Path) -> int:
    """How many cells are executed: those with code, and the one that papermill injects."""
    cells = nbformat.read(path, as_version=4).cells
    return 1 + sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in cells)


def run_notebook(
    path: Path, output: Path, parameters: Mapping, cell_ends: Callable = lambda **_: None
) -> str:
    """Execute a notebook in this interpreter; returns the failure's plain text, "" for success.

    The executed copy is written to `output` in either case; `cell_ends` is called after each cell
    of code, with nbclient's keywords.
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
                on_cell_executed=cell_ends,
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


def package_digest() -> str:
    """Changes with any file of the package, its tables and checkpoints included."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(PACKAGE)} {content}\n".encode())
    return digest.hexdigest()


def fingerprint(path: Path, parameters: Mapping, package: str) -> str:
    """Changes with the notebook's cells, its parameters and the package."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    text = json.dumps([cells, parameters, package], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
