"""Notebooks with the parameters of a profile, and their execution through papermill."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import nbformat
import papermill
import psutil
import yaml
from accelerate.utils import patch_environment

from mdmrl.config import InputError, require, unknown
from mdmrl.identity import digest
from mdmrl.runs import write_atomically
from mdmrl.study.outputs import figures_folder, profile_of, project_root
from mdmrl.study.parameters import Parameter, check, declared

PACKAGE = Path(__file__).parents[1]


def plan(
    profile: str, only: Iterable[str] = (), changes: Mapping = MappingProxyType({})
) -> list[tuple[Path, dict]]:
    """The notebooks to run, in order, each with its parameters at this profile's scale, but for
    `changes`, which all of them must have.

    Raises:
        InputError: an unknown profile or notebook, a notebook that the profile leaves out, or a
            parameter that the notebook does not have, or has with another type (papermill would
            only warn of the one, and take the other).
    """
    settings, only = load_profile(profile), tuple(only)
    notebooks = {path.stem: path for path in sorted((project_root() / "notebooks").glob("*.ipynb"))}
    for name in settings:
        if name not in notebooks:
            raise unknown(f"notebook in {profile}.yaml", name, notebooks)
    for beginning in only:
        if not any(name.startswith(beginning) for name in notebooks):
            raise unknown("notebook", beginning, notebooks)
    jobs = []
    for name, path in notebooks.items():
        if only and not name.startswith(only):
            continue
        require(name in settings, f"{profile}.yaml leaves out {name}: add its parameters, or {{}}")
        known = notebook_parameters(path)
        check(known, {**settings[name], "profile": profile}, f"{name} in {profile}.yaml")
        check(known, changes, name)
        place = profile_of(profile, changes)
        jobs.append((path, {**settings[name], **changes, "profile": place}))
    return jobs


def load_profile(name: str) -> dict[str, dict]:
    """`notebooks/profiles/<name>.yaml`: the parameters of each notebook."""
    folder = project_root() / "notebooks" / "profiles"
    known = [path.stem for path in folder.glob("*.yaml")]
    if name not in known:
        raise unknown("profile", name, known)
    try:
        settings = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{name}.yaml: {error}") from error
    fit = isinstance(settings, Mapping)
    fit = fit and all(isinstance(value, Mapping | None) for value in settings.values())
    require(fit, f"{name}.yaml: expected notebook names, each with a mapping of its parameters")
    return {notebook: dict(parameters or {}) for notebook, parameters in settings.items()}


def notebook_parameters(path: Path) -> dict[str, Parameter]:
    """What a notebook's one parameters cell sets."""
    cells = [c.source for c in _cells(path) if "parameters" in c.metadata.get("tags", [])]
    count = len(cells)
    require(count == 1, f"{path.name}: {count} cells are tagged 'parameters', expected one")
    return declared(cells[0], path.name)


def code_cells(path: Path) -> int:
    """How many cells are executed: those with code, and the one that papermill injects."""
    return 1 + sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in _cells(path))


def run_notebook(
    path: Path, output: Path, parameters: Mapping, cell_ends: Callable = lambda **_: None
) -> str:
    """Execute a notebook by its kernel of `kernels`; returns the failure's plain text, "" for
    success.

    The executed copy is written to `output` in either case; `cell_ends` is called after each cell
    of code, with nbclient's keywords.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernel_name": path.stem, "language": "python", "cwd": path.parent}
    shown = {"progress_bar": False, "on_cell_executed": cell_ends}
    try:
        papermill.execute_notebook(path, output, dict(parameters), **kernel, **shown)
    except papermill.PapermillExecutionError as error:
        return str(error)  # the cell's traceback, without colours
    except Exception as error:  # a dead kernel, say: the other notebooks still run
        return f"{type(error).__name__}: {error}"
    return ""


def write_html(profile: str) -> list[Path]:
    """Write the notebooks that `mdmrl reproduce` has executed as pages in `runs/<profile>/html/`,
    each a file that needs no other: figures are embedded, and widgets stand as their static twins.

    Raises:
        InputError: none has been executed.
    """
    from nbconvert import HTMLExporter

    root = project_root()
    here = root / "runs" / profile
    executed = sorted((here / "notebooks").glob("*.ipynb"))
    wanted = f"{here / 'notebooks'} has no notebook: run mdmrl reproduce --profile {profile} first"
    require(len(executed) > 0, wanted)
    own, pages = figures_folder(profile).relative_to(root).as_posix(), []
    for path in executed:
        where = {"metadata": {"path": str(root), "name": path.stem}}
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":  # a text shows the committed figure
                cell.source = _from_root(cell.source, "figures")
            for shown in (output.get("data", {}) for output in cell.get("outputs", [])):
                if "text/markdown" in shown:
                    shown["text/markdown"] = _from_root(shown["text/markdown"], own)
        page, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook, where)
        pages.append(here / "html" / f"{path.stem}.html")
        write_atomically(pages[-1], page)
    return pages


def _from_root(text: str, figures: str) -> str:
    """A text of a notebook for a page in `runs/<profile>/html/`: its figures by their path from the
    root, out of which nbconvert embeds nothing; what else it links to, from where the page lies."""
    text = re.sub(r'(!\[[^\]]*\]\(|src=")\.\./figures/', rf"\1{figures}/", text)
    return re.sub(r'(\]\(|href=")\.\./', r"\1../../../", text)


@contextmanager
def kernels(notebooks: Iterable[str], at_once: int = 1) -> Iterator[None]:
    """Let the name of a notebook be that of a kernel in this very interpreter, with this very
    package; those that still run at the end are killed.

    Whatever kernels are registered, or none, and whatever the user's IPython starts with. Notebooks
    that run `at_once` share the cores.
    """
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = f"--ipython-dir={folder}"
        spec = {"argv": [*command, own, "--log-level=ERROR"], "language": "python"}
        for name in notebooks:
            made = json.dumps(spec | {"display_name": name, "env": {"MDMRL_NOTEBOOK": name}})
            write_atomically(Path(folder, "kernels", name, "kernel.json"), made)
        inherited = {
            "JUPYTER_PATH": folder,
            "JUPYTER_RUNTIME_DIR": Path(folder, "runtime"),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores // at_once)),
        }
        try:
            with patch_environment(**inherited):
                yield
        finally:
            for child in psutil.Process().children():
                with suppress(psutil.Error):  # it has just ended
                    if own in child.cmdline():
                        child.kill()


def package_digest() -> str:
    """Changes with any file of the package, its tables and checkpoints included."""
    files = (p for p in sorted(PACKAGE.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
    contents = (f"{p.relative_to(PACKAGE)} {sha256(p.read_bytes()).hexdigest()}" for p in files)
    return digest("\n".join(contents))


def fingerprint(path: Path, parameters: Mapping, package: str) -> str:
    """Changes with the notebook's cells, its parameters and the package."""
    cells = [cell.source for cell in _cells(path)]
    return digest(json.dumps([cells, parameters, package], sort_keys=True, default=str))


def _cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells
