"""README and docs: every block of code runs, every link leads somewhere, every finding is measured.

The blocks of a page run in order, in a folder with the files below. Python blocks share their
names. A block that begins with a file's name, as in "# my_rewards.py", is that file too. Of shell
blocks `mdmrl` runs in this process; `make` and `jupyter` are looked up. What stands behind
`<!-- not executed: why -->` is only parsed: the options of `mdmrl` must exist.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from PIL import Image

from mdmrl.cli import app
from mdmrl.evaluation.stats import t_interval
from mdmrl.study.verdicts.table import ROWS

ROOT = Path(__file__).parents[1]
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*OUTSIDE, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not executed: (?P<why>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S
)
SLOW = ("papermill", "torchrun", "accelerate")
SHORT = "def short(completions, **columns): return [-len(text) / 100 for text in completions]\n"
FILES = {
    "prompts.jsonl": [{"prompt": "Which test is decisive for gout?"}, {"prompt": "What is fever?"}],
    "mine.jsonl": [{"prompt": "What is fever?", "completion": "A raised temperature."}] * 2,
    "pairs.jsonl": [{"prompt": "What is fever?", "chosen": "Raised", "rejected": "Cold"}] * 2,
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
COMMAND = typer.main.get_command(app)


@each_page
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_code_runs(page, slow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))  # where notebooks write
    for name, rows in FILES.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    Path("my_rewards.py").write_text(SHORT)
    known = {"__name__": page.stem}
    for block in BLOCK.finditer(page.read_text()):
        code = block["code"]
        if named := re.match(r"# (\S+\.\w+)", code):
            Path(named[1]).write_text(code)
        if block["language"] == "python":
            program = compile(code, f"{page.name}: {code[:40]!r}", "exec")
            if not block["why"]:
                exec(program, known)
        elif block["language"] == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                run(shlex.split(line, comments=True), slow, block["why"] is None)
        else:
            assert block["language"] in ("yaml", "json", "text"), block["language"]


def run(words, slow, executed):
    """Run a line of the shell as far as it can be run here."""
    if not words:
        return
    words[0] = words[0].removeprefix(".venv/bin/")
    if words == [".ci/run"]:
        assert os.access(ROOT / words[0], os.X_OK)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif words[0] == "mdmrl" and executed:
        assert COMMAND.main(words[1:], standalone_mode=False) in (0, None), words
    elif words[0] == "mdmrl" or words[:1] == ["mdmrl"]:
        with COMMAND.make_context("mdmrl", words[1:]) as context:
            name, command, rest = COMMAND.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            command.make_context(name, rest, parent=context)
    elif words[0] in SLOW and slow and executed:
        program = Path(sys.executable).with_name(words[0])
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert words[0] in SLOW or shutil.which(words[0], path=os.path.dirname(sys.executable))


# ------------------------------------------------------------------ links and pictures


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_links_of_notebooks_lead_somewhere():
    """Those of their texts: GitHub shows the committed figures through them."""
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts)):
            path = target.partition("#")[0]
            shown = path.startswith("http") or (notebook.parent / path).exists()
            assert shown, f"{notebook.name} links to {target}"


def test_every_page_is_linked_from_the_front_page():
    front = (ROOT / "README.md").read_text()
    assert len(front.splitlines()) <= 150
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in front
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in front
        thumbnail = ROOT / "docs" / "thumbnails" / f"{notebook.stem}.png"
        assert f"(docs/thumbnails/{thumbnail.name})" in front
        assert Image.open(thumbnail).size == (320, 200)
        assert thumbnail.stat().st_size < 40_000


NUMBERED = ["Def. 2.2.1", "(3-1)", "(3-2)", "Table 4-1", "Table A-1", "Fig. A-1"]
NUMBERED += [f"Fig. {n}" for n in ("3-1", "3-2", "3-3", "4-1", "4-2", "4-3", "4-4", "5-1", "5-2")]


def test_the_map_of_the_thesis_names_what_there_is():
    """Functions and classes that can be imported, notebooks, and rows that are judged; and all that
    the thesis numbers has a line, with a function."""
    text = (ROOT / "docs" / "thesis.md").read_text()
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    for item in NUMBERED:
        (line,) = (line for line in lines if re.search(rf"{re.escape(item)}(?!\d)", line[1]))
        assert "`mdmrl." in line[3], item
    for module, name in re.findall(r"`(mdmrl[\w.]*)\.(\w+)`", text):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for notebook in re.findall(r"`(\d\d_\w+)`", text):
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists(), notebook
    said = set()
    for first, joint, last in re.findall(r"rows? (\d+)(?: (and|to) (\d+))?", text):
        said |= {*range(int(first), int(last) + 1)} if joint else {int(first)}
    assert said == {row.number for row in ROWS}


def test_every_package_and_every_shipped_file_has_a_licence():
    """Each package that pyproject.toml names, with the licence that it states itself where it is
    installed and states one; each table that ships."""
    text = (ROOT / "docs" / "licences.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    licence = {name: row[2] for row in rows for name in re.findall("`([^`]+)`", row[1])}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for wanted in [*project["dependencies"], *itertools.chain(*extras)]:
        name = Requirement(wanted).name
        assert name in licence, name
        with contextlib.suppress(metadata.PackageNotFoundError):
            stated = metadata.metadata(name).get("License-Expression")
            assert not stated or stated.split()[0] in licence[name] or name == "torch", name
    data = ROOT / "mdmrl"
    shipped = {path for ending in ("tsv", "txt", "md") for path in data.glob(f"*/*.{ending}")}
    assert {str(path.relative_to(ROOT)) for path in shipped} <= licence.keys()
    assert all([*ROOT.glob(name)] for name in licence if "/" in name)


def test_the_citation_is_of_this_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


# ------------------------------------------------------------------ findings


def closed(table, **chosen):
    """The share of the headroom that an arm closes, with its interval, as the README says it."""
    rows = pd.read_csv(ROOT / "figures" / "data" / table)
    for column, value in chosen.items():
        rows = rows[rows[column] == value]
    return said(*t_interval(rows.closed))


def claim(identity, change=lambda x: x, digits=2):
    found = json.loads((ROOT / "figures" / "claims.json").read_text())
    (row,) = [row for row in found if row["id"] == identity]
    ends = [change(row[end]) for end in ("estimate", "low", "high")]
    return said(ends[0], *sorted(ends[1:]), digits)


def said(estimate, low, high, digits=2):
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def test_findings_are_what_the_files_say():
    front = " ".join((ROOT / "README.md").read_text().split())
    masks, clean = "MDM one_step, 16 steps", "MDM ar_style, 16 steps"
    for measured in (
        claim("countdown_gain_trajectory", digits=3),
        claim("countdown_gain_one_step", digits=3),
        claim("countdown_gain_ar", digits=3),
        claim("countdown_gain_ar_style", lambda x: -x, digits=3),
        claim("row_20_mdm"),
        claim("row_20_ar"),
        claim("narrowing_mdm_4_steps", lambda x: -x),
        claim("narrowing_ar", lambda x: -x),
        closed("kl_cured.csv", arm="recommended, 64 steps"),
        claim("kl_is_cured"),
        closed("kl_grid.csv", arm=masks),
        closed("kl_grid.csv", arm=f"{masks}, k3, β = 0.05"),
        closed("kl_grid.csv", arm=clean),
        claim("row_10_medcot", digits=1),
        claim("sampling_seconds", math.exp, digits=1),
        claim("few_steps_pay_few_steps_equal_updates_reward"),
        claim("few_steps_pay_few_steps_equal_cost_reward", digits=1),
        claim("few_steps_pay_few_steps_equal_cost_accuracy", lambda x: -x),
        claim("value_judges"),
        claim("value_judges_answers"),
        claim("value_guides", lambda x: -x, digits=3),
    ):
        assert measured in front, measured
    rows = pd.read_csv(ROOT / "figures" / "data" / "kl_cured.csv")
    gains = rows[rows.arm == "recommended, 64 steps"].mean(numeric_only=True)
    for part, what in (("gain/depth", "are paragraph breaks"), ("gain/format", "tags")):
        assert f"{gains[part] / gains.gain:.0%} {what}".replace("%", " %") in front
