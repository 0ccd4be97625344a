"""Parameters of notebooks: what is refused, by hand under papermill and in a sweep."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from test_notebooks import NOTEBOOKS, study, write_notebook

from mdmrl.config import InputError
from mdmrl.study.outputs import figures_folder
from mdmrl.study.parameters import check, declared
from mdmrl.study.reproduce import reproduce, sweep

__all__ = ["study"]  # a fixture

CELL = """profile: str = "explore"
size: int = 3
beta: float = 0.5
name: str | None = None
counts: list[int] = [1, 2]
changes: dict = {}
arms: dict[str, str] = {"a": "b"}
factors: list[dict] = []
"""
KNOWN = declared(CELL, "n.ipynb")


@pytest.mark.parametrize(
    "given",
    [
        {"size": -4, "beta": 1, "name": "x", "counts": []},
        {"beta": 1e-5, "name": None, "counts": [7], "changes": {"a": [1, None]}},
        {"arms": {}, "factors": [{"a": 1}]},
    ],
)
def test_what_fits(given):
    check(KNOWN, given, "n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bta": 1.0}, "unknown parameter of n 'bta': did you mean 'beta'"),
        ({"size": 3.0}, "parameter of n size=3.0: expected int, as in 3"),
        ({"size": True}, "expected int"),
        ({"beta": "1e-5"}, "beta='1e-5': expected float, as in 0.5"),
        ({"name": 5}, "expected str | None"),
        ({"counts": 4}, "expected list[int], as in [1, 2]"),
        ({"counts": [1, 2.5]}, "expected list[int]"),
        ({"arms": {"a": 1}}, "expected dict[str, str]"),
        ({"factors": ["a"]}, "expected list[dict]"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(InputError) as error:
        check(KNOWN, given, "n")
    assert message in str(error.value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_refuses_parameters(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert "parameters" in cells[0].metadata.tags
    assert "outputs = Outputs(" in cells[1].source


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("", None),
        ("# Parameters\nbeta = 1\n", None),
        ("# Parameters\nbeta = None\n", "beta=None: expected float"),
        ("# Parameters\nbtea = 1\n", "unknown parameter of this notebook 'btea'"),
    ],
)
def test_outputs_refuse_what_papermill_injects(injected, message, monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    for source in filter(None, [CELL, injected]):
        shell.run_cell(source, store_history=True).raise_error()
    made = shell.run_cell("from mdmrl.study.outputs import Outputs\nOutputs(profile)")
    assert (made.error_in_exec is None) == (message is None)
    assert message is None or message in str(made.error_in_exec)


@pytest.mark.slow
@pytest.mark.parametrize("where", [".", "notebooks"])
def test_papermill_by_hand(study, monkeypatch, where):
    """With each of its ways to give parameters, from the root and from the notebooks' folder."""
    write_notebook(
        study / "notebooks" / "n.ipynb",
        "from mdmrl.study.outputs import Outputs\n"
        "outputs = Outputs(profile)\nprint(size, beta, counts)",
        parameters=CELL,
    )
    monkeypatch.chdir(study / where)
    Path("given.yaml").write_text("beta: 0.25\n")
    program = Path(sys.executable).with_name("papermill")
    path = "n.ipynb" if where == "notebooks" else "notebooks/n.ipynb"

    def run(*options):
        command = [program, path, "out.ipynb", "-l", "python", "-f", "given.yaml", *options]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("-p", "size", "7", "-y", "counts: [5]").returncode == 0
    cells = nbformat.read("out.ipynb", as_version=4).cells
    assert cells[-1].outputs[0].text == "7 0.25 [5]\n"
    refused = run("-p", "sise", "7")
    assert refused.returncode != 0 and "did you mean 'size'" in refused.stderr


# ------------------------------------------------------------------ sweeps

SWEPT = """
import pandas as pd
from mdmrl.study.outputs import Outputs
from mdmrl.study.ledger import Claim

outputs = Outputs(profile)
outputs.data(pd.DataFrame({"size": [size, size + 1]}), "sizes")
outputs.claim(Claim(id="a", says="it", where="here", measured=f"{size}", verdict="erratum"))
"""


def test_a_sweep_collects_its_tables(study, monkeypatch):
    def in_this_process(path, output, parameters, cell_ends):
        monkeypatch.setenv("MDMRL_NOTEBOOK", path.stem)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        exec(SWEPT, dict(parameters))
        return "" if parameters["size"] != 9 else "a traceback"

    monkeypatch.setattr("mdmrl.study.reproduce.run_notebook", in_this_process)
    assert sweep("smoke", ["00"], "size", [1, 4]) == 0
    folder = study / "runs" / "smoke" / "sweeps" / "size"
    sizes = pd.read_csv(folder / "sizes.csv")
    assert sizes.to_dict("list") == {"swept_size": [1, 1, 4, 4], "size": [1, 2, 4, 5]}
    assert pd.read_csv(folder / "claims.csv").measured.tolist() == [1, 4]
    assert figures_folder("smoke@size=4") == study / "runs" / "smoke@size=4" / "figures"
    assert not (study / "runs" / "smoke" / "figures").exists()
    assert sweep("smoke", ["00"], "size", [1, 9]) == 1
    assert reproduce("smoke", ["00"]) == 0


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("size", [1, "x"], "parameter of 00_fine size='x': expected int"),
        ("sise", [1], "unknown parameter of 00_fine 'sise'"),
        ("size", [], "a sweep needs notebooks and values"),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused_before_any_work(study, name, values, message):
    with pytest.raises(InputError, match=message):
        sweep("smoke", ["00"], name, values)
    assert not (study / "runs").exists()
