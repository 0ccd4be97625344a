"""The notebooks' form, and the runner that executes them."""

import ast
import json
import os
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mdmrl.study.reproduce import load_profile, notebook_parameters, plan, reproduce

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROFILES = ("smoke", "cpu", "full")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

START, END = "<!-- claims:start -->", "<!-- claims:end -->"


# ------------------------------------------------------------------ form


@each_notebook
def test_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= 25, cell.source


@each_notebook
def test_papermill_sees_the_parameters_that_the_cell_assigns(path):
    seen = papermill.inspect_notebook(path)
    assert {
        name: ast.literal_eval(parameter["default"]) for name, parameter in seen.items()
    } == notebook_parameters(path)


@each_notebook
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_fits(path, profile):
    (job,) = plan(profile, [path.stem])
    assert job[0].stem == path.stem
    assert path.stem in load_profile(profile)


# ------------------------------------------------------------------ execution


@pytest.fixture
def results_elsewhere(tmp_path, monkeypatch):
    """The project's notebooks, with an empty place for what they write."""
    (tmp_path / "notebooks").symlink_to(FOLDER)
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))


@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=lambda path: path.stem)
def test_the_first_notebook_runs(results_elsewhere, path):
    assert reproduce("smoke", [path.stem]) == 0


@pytest.mark.slow
def test_all_notebooks_run(results_elsewhere):
    assert reproduce("smoke") == 0


# ------------------------------------------------------------------ the runner

PARAMETERS = 'profile: str = "cpu"  # where outputs go\nsize: int = 3  # how much'
FINE = """
from matplotlib.figure import Figure
from mdmrl.study.ledger import Claim
from mdmrl.study.outputs import Outputs

outputs = Outputs(profile)
outputs.figure(Figure(), "fig_a")
outputs.claim(Claim(id="a", says="it", where="here", measured="[b]1[/b] of 2", verdict="erratum"))
"""
WHERE = """
import os, sys
print(size, profile, sys.executable, os.path.basename(os.getcwd()), os.environ["OMP_NUM_THREADS"])
"""


def write_notebook(path: Path, *sources: str, parameters: str = PARAMETERS) -> None:
    cells = [new_markdown_cell("# A question"), new_code_cell(parameters)]
    cells[1].metadata["tags"] = ["parameters"]
    notebook = new_notebook(cells=cells + [new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A checkout with one notebook, its README and its profiles."""
    write_notebook(tmp_path / "notebooks" / "00_fine.ipynb", FINE, WHERE)
    for profile in ("smoke", "full"):
        write_profile(tmp_path, "00_fine: {size: 5}", profile)
    (tmp_path / "README.md").write_text(f"{START}\n{END}\n")
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    return tmp_path


def write_profile(root: Path, text: str, profile: str = "smoke") -> None:
    path = root / "notebooks" / "profiles" / f"{profile}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_a_failure_is_shown_and_the_others_run(study, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = dict(os.environ)
    write_notebook(study / "notebooks" / "00_broken.ipynb", "divisor = 0", "1 / divisor")
    write_profile(study, "00_broken:\n00_fine: {size: 5}")
    assert reproduce("smoke") == 1

    text = capsys.readouterr().out
    assert "[1/2] 00_broken: failed after" in text
    assert "1 / divisor" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "\x1b" not in text
    assert "[2/2] 00_fine: done in" in text
    row = next(line for line in text.splitlines() if "│ 00_fine" in line)
    assert [cell.strip() for cell in row.split("│")[3:-1]] == ["1", "1", "ok"]
    assert "[b]1[/b] of 2" in text
    assert dict(os.environ) == before

    executed = nbformat.read(study / "runs" / "smoke" / "notebooks" / "00_fine.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.split() == [
        "5",
        "smoke",
        sys.executable,
        "notebooks",
        "1",
    ]
    figures = study / "runs" / "smoke" / "figures"
    assert json.loads((figures / "fig_a.json").read_text())["notebook"] == "00_fine"
    assert not (study / "figures").exists()


def test_what_has_not_changed_is_not_run_again(study, capsys, monkeypatch):
    runs = []

    def run_notebook(path, output, parameters):
        runs.append(parameters)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        return outcome

    monkeypatch.setattr("mdmrl.study.reproduce.run_notebook", run_notebook)

    def again(**options) -> int:
        before = len(runs)
        code = reproduce("smoke", **options)
        assert code == bool(outcome)
        return len(runs) - before

    outcome = ""
    assert [again(), again(), again(force=True), again()] == [1, 0, 1, 0]
    write_profile(study, "00_fine: {size: 6}")
    assert [again(), again()] == [1, 0]
    write_notebook(study / "notebooks" / "00_fine.ipynb", FINE + "\n'more'")
    assert [again(), again()] == [1, 0]
    (study / "runs" / "smoke" / "notebooks" / "00_fine.ipynb").unlink()
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr("mdmrl.study.reproduce._package_digest", lambda: "another version")
    assert [again(), again()] == [1, 0]
    outcome = "a traceback"
    assert [again(force=True), again()] == [1, 1]  # a failure is never taken for done
    assert "unchanged" in capsys.readouterr().out


def test_a_full_run_writes_figures_and_the_readme(study, monkeypatch):
    def in_this_process(path, output, parameters):
        monkeypatch.setenv("MDMRL_NOTEBOOK", path.stem)
        exec(FINE, parameters)
        return ""

    monkeypatch.setattr("mdmrl.study.reproduce.run_notebook", in_this_process)
    assert reproduce("full") == 0
    assert sorted(path.name for path in (study / "figures").glob("fig_*")) == [
        "fig_a.json",
        "fig_a.pdf",
        "fig_a.png",
    ]
    assert "| erratum | [00_fine](notebooks/00_fine.ipynb) |" in (study / "README.md").read_text()


def test_a_full_run_without_a_place_for_its_claims_does_not_start(study, monkeypatch):
    (study / "README.md").write_text("no markers")
    monkeypatch.setattr("mdmrl.study.reproduce.run_notebook", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="no place for the claims"):
        reproduce("full")


def test_a_dead_kernel_is_a_failure(study, capsys):
    write_notebook(study / "notebooks" / "00_fine.ipynb", "import os", "os._exit(1)")
    assert reproduce("smoke") == 1
    assert "DeadKernelError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("profile", "only", "message"),
    [
        (
            "00_fine: {sise: 5}",
            [],
            "parameter of 00_fine in smoke.yaml 'sise': did you mean 'size'",
        ),
        ("00_fine:\n01_fine:", [], "notebook in smoke.yaml '01_fine': did you mean '00_fine'"),
        ("00_fine:", ["00", "07"], "unknown notebook '07'"),
        ("", [], "smoke.yaml leaves out 00_fine"),
        ("00_fine: 3", [], "expected notebook names, each with a mapping"),
        ("- 00_fine", [], "expected notebook names, each with a mapping"),
        ("00_fine: {", [], "smoke.yaml: while parsing"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_before_any_work(study, profile, only, message):
    write_profile(study, profile)
    with pytest.raises(ValueError, match=message):
        reproduce("smoke", only)
    assert not (study / "runs").exists()


@pytest.mark.parametrize(
    "parameters", ["size = 3 * 4", "size = len('abc')", "size += 1", "a, b = 1, 2", "import os"]
)
def test_a_parameters_cell_holds_literals_only(tmp_path, parameters):
    write_notebook(tmp_path / "n.ipynb", parameters=parameters)
    with pytest.raises(ValueError, match="expected one name set to a literal"):
        notebook_parameters(tmp_path / "n.ipynb")


def test_a_notebook_has_one_parameters_cell(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("a = 1")]), tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="0 cells are tagged"):
        notebook_parameters(tmp_path / "n.ipynb")
