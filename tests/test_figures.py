"""The registry of figures: each is drawn from its tables alone, and says what they say."""

import csv
import json
import re
import shutil
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import pytest

from mdmrl.study import ledger
from mdmrl.study.figures import FIGURES
from mdmrl.study.figures.__main__ import redraw
from mdmrl.study.figures.gallery import gallery, pictures
from mdmrl.study.verdicts import ROWS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "figures"
DRAWN = {path.stem for path in FOLDER.glob("*.png")}


def test_every_committed_figure_is_one_of_the_registry_with_all_that_it_is_made_of():
    assert FIGURES.keys() >= DRAWN
    for name in DRAWN:
        origin = json.loads((FOLDER / f"{name}.json").read_text())
        assert (origin["notebook"], origin["profile"]) == (FIGURES[name].notebook, "full")
        assert (FOLDER / f"{name}.pdf").exists()
        for table in FIGURES[name].tables:
            assert (FOLDER / "data" / f"{table}.csv").exists(), f"{name}: {table}"
    assert {path.stem for path in FOLDER.glob("*.json")} == DRAWN | {"claims"}


def test_every_notebook_draws_its_figures_and_names_them_at_its_beginning():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        first, *cells = ("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
        own = {name for name, of in FIGURES.items() if of.notebook == path.stem}
        drawn = re.findall(r'outputs\.draw\(\s*f?"(\w+(?:\{measure\})?)"', "\n".join(cells))
        said = {name.replace("{measure}", of) for name in drawn for of in ("accuracy", "reward")}
        assert said == own, path.stem
        assert {name for name in own if f"`{name}`" not in first} == set(), path.stem


def test_the_gallery_shows_every_figure_with_what_it_says():
    page = (FOLDER / "README.md").read_text()
    assert page == gallery(FOLDER)
    for name in FIGURES:
        assert (f"![{name}]({name}.png)" in page) == (name in DRAWN), name
        assert (f"`python -m mdmrl.study.figures {name}`" in page) == (name in DRAWN), name
        assert f"`{name}` (" in page or name in DRAWN
    claims = {claim.id: claim for claim in ledger.load(FOLDER / "claims.json")}
    for name in DRAWN:
        said = FIGURES[name].finding(FOLDER, claims)
        assert re.search(r"\d", said) and said.endswith("."), said
        assert not said.startswith("Not known yet"), said


def test_a_finding_is_filled_from_the_ledger_and_says_what_is_missing():
    of = FIGURES["value_guided"]
    claim = ledger.Claim(
        id="value_guides", says="", where="", measured="m", verdict="measured", estimate=0.25
    )
    assert of.finding(FOLDER, {}) == "Not known yet: value_guides."
    assert "V earns 0.25 of reward" in of.finding(FOLDER, {"value_guides": claim})
    claim = claim.replace(low=-0.5, high=1.0)
    assert "V earns 0.25 [-0.5, 1] of reward" in of.finding(FOLDER, {"value_guides": claim})


def test_what_is_drawn_is_what_the_table_says():
    """Means over seeds, hollow with few denoising steps and filled with many."""
    with (FOLDER / "data" / "few_steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = FIGURES["few_steps"].draw({}, *FIGURES["few_steps"].read(FOLDER))
    axes = figure.axes[0]
    marks = [line for line in axes.get_lines() if line.get_marker() == "o"]
    drawn = {
        (round(line.get_ydata()[0]), line.get_markerfacecolor() == "white"): line.get_xdata()[0]
        for line in marks
    }
    names = [label.get_text() for label in axes.get_yticklabels()]
    for place, name in enumerate(names):
        for steps, hollow in ((8, True), (64, False)):
            found = [
                float(row["accuracy"])
                for row in rows
                if row["model"] == name and int(row["steps"]) == steps
            ]
            assert drawn[place, hollow] == pytest.approx(mean(found))
    assert len(drawn) == 2 * len(names) == 10
    plt.close(figure)


def test_redrawing_leaves_the_provenance_and_writes_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "figures" / "data").mkdir(parents=True)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    for name in ("few_steps.json", "data/few_steps.csv"):
        shutil.copy(FOLDER / name, tmp_path / "figures" / name)
    before = (tmp_path / "figures" / "few_steps.json").read_bytes()
    found = []
    for _ in range(2):
        assert redraw(tmp_path / "figures", "few_steps")
        found.append([p.read_bytes() for p in sorted((tmp_path / "figures").glob("few_steps.p*"))])
    assert len(found[0]) == 2 and found[0] == found[1]
    assert (tmp_path / "figures" / "few_steps.json").read_bytes() == before
    assert not redraw(tmp_path / "figures", "kl_grid")  # no run has made it there
    with pytest.raises(ValueError, match="did you mean 'few_steps'"):
        redraw(tmp_path / "figures", "few_step")


def test_every_row_that_is_judged_has_a_figure():
    rows = {row for of in FIGURES.values() for row in of.rows}
    assert rows == {row.number for row in ROWS}
    judged = {claim.row for claim in ledger.load(FOLDER / "claims.json") if claim.row}
    assert judged <= pictures(FOLDER).keys()
