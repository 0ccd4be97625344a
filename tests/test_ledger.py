"""Claims and outputs: what is written, where, and that a crash or a second writer loses nothing."""

import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure

from mdmrl.evaluation.stats import Interval
from mdmrl.study.ledger import Claim, fill_claims, load, record, render, settled, slug
from mdmrl.study.outputs import Outputs, figures_folder, figures_of, project_root
from mdmrl.study.verdicts import ROWS

START, END = "<!-- claims:start -->", "<!-- claims:end -->"


def claim(**changes) -> Claim:
    facts = {
        "id": "fig_4_1_ar",
        "says": "The AR model's mean reward rises",
        "where": "Fig. 4-1",
        "measured": "reward gained",
        "estimate": 0.4127,
        "low": 0.32,
        "high": 0.5,
        "seeds": 5,
        "verdict": "measured",
        "notebook": "03_reward_curves",
        "profile": "full",
    }
    return Claim.from_dict(facts | changes)


def judged(row=1, line="MedCoT, greedy", **changes) -> Claim:
    facts = {"id": f"row_{row}_{slug(line)}", "row": row, "line": line}
    return claim(**facts | {"p": 1e-5, "verdict": "reproduced"} | changes)


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    return tmp_path


# ------------------------------------------------------------------ the ledger


def test_recording_again_replaces_the_row_and_keeps_the_order(tmp_path):
    for row in (claim(id="b"), claim(id="a"), claim(id="b", verdict="erratum")):
        path = record(row, tmp_path)
    assert [(row.id, row.verdict) for row in load(path)] == [
        ("a", "measured"),
        ("b", "erratum"),
    ]
    before = path.read_bytes()
    record(claim(id="a"), tmp_path)
    assert path.read_bytes() == before


def test_writers_side_by_side_lose_no_row(tmp_path):
    # The lock belongs to the open file, so that threads exclude each other as processes do.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: record(claim(id=f"{i:02}"), tmp_path), range(40)))
    assert [row.id for row in load(tmp_path / "claims.json")] == [f"{i:02}" for i in range(40)]


def test_an_interrupted_write_leaves_the_old_ledger(tmp_path, monkeypatch):
    path = record(claim(), tmp_path)
    before = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="disk full"):
            record(claim(id="other"), tmp_path)
    assert path.read_bytes() == before
    record(claim(id="other"), tmp_path)  # the lock was let go
    assert len(load(path)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "mesured"}, "did you mean 'measured'"),
        ({"verdict": "reproduced"}, "expected a row and a line where, and only where"),
        ({"row": 1, "line": "MedCoT, greedy"}, "expected a row and a line where, and only where"),
        ({"verdict": "contradicted", "row": 1}, "expected a row and a line"),
        ({"verdict": "contradicted", "row": 1, "line": "MedCot"}, "unknown line of row 1 'MedCot'"),
        ({"verdict": "contradicted", "row": 0, "line": "MedCoT"}, "unknown row 0"),
        ({"estimate": float("nan")}, "estimate=nan"),
        ({"high": None}, "both ends"),
        ({"low": 0.6}, "both ends in order"),
        ({"estimate": None}, "needs an estimate"),
        ({"id": ""}, "id is empty"),
        ({"seeds": -1}, "seeds=-1"),
        ({"verdit": "erratum"}, "did you mean 'verdict'"),
    ],
)
def test_a_wrong_claim_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        claim(**changes)


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    (tmp_path / "claims.json").write_text('[{"id": ')
    with pytest.raises(ValueError, match=r"claims\.json is no claims ledger"):
        record(claim(), tmp_path)


TRAINED = [(row.number, line) for row in ROWS if row.trained for line in row.lines]


def test_one_small_p_of_many_declared_lines_reproduces_nothing():
    (alone,) = settled([judged(p=0.04)])
    assert (alone.verdict, alone.p_holm) == ("inconclusive", 1)
    bound = 0.05 / len(TRAINED)  # the others, which nobody has recorded, have p = 1
    for p, verdict in ((bound * 0.99, "reproduced"), (bound * 1.01, "inconclusive")):
        (found,) = settled([judged(p=p)])
        assert found.verdict == verdict
        assert found.p_holm == pytest.approx(p * len(TRAINED))


def test_verdicts_are_those_of_holms_procedure_over_all_declared_lines():
    draw = np.random.default_rng(0)
    for _ in range(50):
        ps = np.where(draw.random(len(TRAINED)) < 0.5, draw.random(len(TRAINED)) * 0.004, 1)
        kept = draw.random(len(TRAINED)) < 0.8
        claims = [
            judged(*line, p=float(p), verdict="reproduced" if p < 0.05 else "inconclusive")
            for line, p, keep in zip(TRAINED, ps, kept, strict=True)
            if keep
        ]
        found = {(c.row, c.line) for c in settled(claims) if c.verdict == "reproduced"}
        # By its definition: from the smallest p on, until one is not below 0.05 / (those left).
        expected, left = set(), len(TRAINED)
        for own in sorted(claims, key=lambda c: c.p):
            if own.p >= 0.05 / left:
                break
            expected.add((own.row, own.line))
            left -= 1
        assert found == expected


def test_other_verdicts_are_left_as_they_are():
    for own in (
        judged(verdict="contradicted", p=1.0),
        judged(10, "MedCoT", p=None),
        judged(19, "tiny-ar", p=0.04),
        claim(),
    ):
        assert settled([own])[0].verdict == own.verdict
    assert settled([judged(p=None, verdict="inconclusive")])[0].p_holm == 1


def test_a_line_that_is_recorded_later_settles_the_others_anew(tmp_path):
    few = 0.05 / len(TRAINED)
    path = record(judged(p=few * 1.001), tmp_path)
    assert load(path)[0].verdict == "inconclusive"
    record(judged(line="Countdown, greedy", p=few / 2), tmp_path)
    assert {c.verdict for c in load(path)} == {"reproduced"}  # one fewer is left to correct for
    record(judged(line="Countdown, greedy", p=1.0, verdict="contradicted"), tmp_path)
    assert {c.verdict for c in load(path)} == {"inconclusive", "contradicted"}


def test_the_committed_ledger_is_settled_by_the_declared_lines():
    found = load(Path(__file__).parents[1] / "figures" / "claims.json")
    assert settled(found) == found
    assert {c.profile for c in found} == {"full"}
    assert all(c.id == f"row_{c.row:02}_{slug(c.line)}" for c in found if c.row)


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows below each heading, cell by cell."""
    parts = [part.splitlines() for part in text.split("### ")[1:]]
    cut = [(name, [line for line in lines if line.startswith("| ")]) for name, *lines in parts]
    return {name: [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in lines] for name, lines in cut}


def test_the_page_has_a_line_a_row_then_errata_then_what_is_measured():
    claims = [
        judged(p=1e-5, conditional=True),
        judged(line="code, greedy", p=0.2, verdict="inconclusive"),
        judged(9, "plateau", p=0.2, verdict="inconclusive", seeds=0),
        claim(says="a | b\nc", unit="points"),
        claim(id="e", estimate=32_243_712, low=None, high=None, verdict="erratum"),
    ]
    found = tables(render(claims, {1: "main_experiment"}))
    assert list(found) == ["Judged", "Errata", "Measured"]
    head, _, *rows = found["Judged"]
    assert head == ["Figure", "Claim", "Verdict", "Measured here"]
    assert len(rows) == len(ROWS)
    for row, cells in zip(ROWS, rows, strict=True):
        assert cells[1] == f"**{row.number}{' T' * row.trained}.** {row.says} ({row.where})"
        assert bool(cells[0]) == (row.number == 1)
        said = cells[3].split("<br>")
        lines = [text.split(":")[0][2:] for text in said if text.startswith("**")]
        missing = said[-1].removeprefix("Not judged yet: ").split("; ")
        assert sorted([*lines, *(missing if len(lines) < len(row.lines) else ())]) == sorted(
            row.lines
        )
    path = "../figures/main_experiment.png"
    assert rows[0][0].startswith(f'<a href="{path}"><img src="{path}" width=')
    assert rows[0][2] == "1 reproduced, 1 inconclusive"
    link = "[03_reward_curves](../notebooks/03_reward_curves.ipynb)"
    assert rows[0][3].startswith(
        "**MedCoT, greedy: reproduced.** reward gained: 0.413 [0.32, 0.5] "
        f"(p 1e-05 / {1e-5 * len(TRAINED):.2g}, conditional on these checkpoints)<br>"
    )
    assert rows[8][2:] == [
        "1 inconclusive",
        f"**plateau: inconclusive.** reward gained: 0.413 [0.32, 0.5] (p 0.2)<br>{link}"
        "<br>Not judged yet: equal tokens",
    ]
    assert rows[1][2] == "not judged yet"
    assert found["Measured"][2:] == [
        [r"a \| b c", "Fig. 4-1", "reward gained: 0.413 [0.32, 0.5] points", "5", link]
    ]
    assert found["Errata"][2][2] == "reward gained: 32,243,712"


def test_a_notebooks_part_has_only_what_it_claims(root):
    outputs = Outputs("full", notebook="06_benchmark_tables")
    for own in (judged(), claim(notebook="05_estimator_lab", id="other")):
        record(own, root / "figures")
    record(judged(9, "plateau", notebook="06_benchmark_tables"), root / "figures")
    found = tables(outputs.found().data)
    assert list(found) == ["Judged"]
    assert [cells[1].split(".")[0] for cells in found["Judged"][2:]] == ["**9"]


def test_a_notebooks_pictures_are_those_of_its_profile(root, monkeypatch):
    """From `notebooks/`, where it is worked in, and from where `mdmrl reproduce` puts its copy."""
    outputs = Outputs("quick", notebook="03_reward_curves")
    record(judged(), outputs.folder)
    (outputs.folder / "main_experiment.png").touch()
    for folder in ("../runs/quick/figures", "../figures"):
        assert f'src="{folder}/main_experiment.png"' in outputs.found().data
        monkeypatch.setenv("MDMRL_NOTEBOOK", "03_reward_curves")


# ------------------------------------------------------------------ the page


def test_a_sentence_with_its_interval_is_left_as_it_is():
    said = "G is 0.413 [0.32, 0.5]"
    assert f"| {said} |" in render([claim(measured=said)])
    assert f"| {said}: 0.413 [0.32, 0.51] |" in render([claim(measured=said, high=0.51)])


def test_the_page_gets_full_claims_only_and_again_the_same(tmp_path):
    page = tmp_path / "results.md"
    page.write_text(f"# Title\n\n{START}\nwhat was there\n{END}\n\nThe end.\n")
    fill_claims(page, tmp_path / "claims.json")
    assert page.read_text().startswith(f"# Title\n\n{START}\n\nNo `full` run")

    record(claim(), tmp_path)
    path = record(claim(id="z", says="a trial", profile="cpu"), tmp_path)
    fill_claims(page, path)
    once = page.read_text()
    assert "mean reward rises" in once
    assert "a trial" not in once
    assert "what was there" not in once
    assert once.endswith(f"\n\n{END}\n\nThe end.\n")
    fill_claims(page, path)
    assert page.read_text() == once


@pytest.mark.parametrize("text", ["", START, f"{END}\n{START}", f"{START}{END}{START}{END}"])
def test_a_page_without_its_markers_is_left_alone(tmp_path, text):
    page = tmp_path / "results.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"results\.md has no place for the claims"):
        fill_claims(page, record(claim(), tmp_path))
    assert page.read_text() == text


# ------------------------------------------------------------------ outputs


def drawn() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], label="reward")
    figure.legend()
    return figure


def test_only_the_full_profile_writes_figures(root):
    assert figures_folder("full") == root / "figures"
    assert figures_folder("cpu") == root / "runs" / "cpu" / "figures"
    with pytest.raises(ValueError, match="names a folder"):
        figures_folder("../full")


def test_a_root_without_notebooks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="MDMRL_ROOT"):
        project_root()


def test_a_figure_comes_with_its_provenance_and_identical_bytes(root, monkeypatch):
    monkeypatch.setenv("MDMRL_NOTEBOOK", "03_reward_curves")
    outputs = Outputs("smoke")
    path = outputs.figure(drawn(), "fig_4_1_reward", seeds=range(2), runs=["ar-0123"])
    pdf = path.with_suffix(".pdf")
    first = path.read_bytes(), pdf.read_bytes()
    assert b"/FontType 42" in pdf.read_bytes() or b"/CIDFontType2" in pdf.read_bytes()
    assert path == outputs.figure(drawn(), "fig_4_1_reward", seeds=range(2))
    assert (path.read_bytes(), pdf.read_bytes()) == first

    origin = json.loads(path.with_suffix(".json").read_text())
    assert origin["notebook"] == "03_reward_curves"
    assert origin["profile"] == "smoke"
    assert origin["seeds"] == [0, 1]
    assert origin["command"] == "mdmrl reproduce --profile smoke --only 03_reward_curves"
    assert {"torch", "transformers", "peft", "machine", "revision"} <= origin.keys()
    assert str(root) not in json.dumps(origin)
    assert os.uname().nodename not in origin.values()
    assert figures_of("03_reward_curves", outputs.folder) == ["fig_4_1_reward"]
    assert figures_of("00_tour", outputs.folder) == []
    assert sorted(p.suffix for p in outputs.folder.iterdir()) == [".json", ".pdf", ".png"]


def test_data_and_claims_go_beside_the_figures(root):
    outputs = Outputs("full", notebook="03_reward_curves")
    frame = pd.DataFrame({"step": [0, 1], "reward": [0.1, 1 / 3]})
    outputs.data(frame, "reward")
    pd.testing.assert_frame_equal(pd.read_csv(root / "figures" / "data" / "reward.csv"), frame)

    done = outputs.claim(claim(notebook="", profile=""))
    assert (done.notebook, done.profile) == ("03_reward_curves", "full")
    assert load(root / "figures" / "claims.json") == [done]
    assert "<b>" in done._repr_html_() and "Claim(" not in done._repr_html_()


def test_tables_of_a_notebook_have_no_index_that_only_counts(root, monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    Outputs("smoke", notebook="00_tour")

    def shown(table) -> list[str]:
        page = shell.display_formatter.format(table)[0]["text/html"]
        return [text for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page) if text]

    frame = pd.DataFrame({"arm": ["a", "b"], "gain": [0.123456, 2.5]}, index=[7, 3])
    assert shown(frame) == ["arm", "gain", "a", "0.1235", "b", "2.5"]
    assert shown(frame.rename_axis("T")) == [
        "arm",
        "gain",
        "T",
        "7",
        "a",
        "0.1235",
        "3",
        "b",
        "2.5",
    ]
    assert shown(frame.set_index("arm").gain) == ["gain", "arm", "a", "0.1235", "b", "2.5"]


def test_what_a_rule_says_becomes_a_claim(root):
    outputs, gains = Outputs("full", notebook="03_reward_curves"), [1.0, 1.1, 1.2, 1.1, 1.0]
    verdict = ROWS[0].rule(gains, prompts=200)
    shown = outputs.judge(1, "MedCoT, greedy", gains, prompts=200)
    (found,) = load(root / "figures" / "claims.json")
    assert (found.id, found.row, found.line) == ("row_01_medcot_greedy", 1, "MedCoT, greedy")
    assert (found.says, found.where) == (ROWS[0].says, ROWS[0].where)
    assert (found.seeds, found.conditional, found.p) == (5, True, verdict.p)
    assert (found.estimate, found.low, found.high) == (verdict.estimate, verdict.low, verdict.high)
    assert found.p_holm == pytest.approx(verdict.p * len(TRAINED))
    assert shown == f"reproduced: {found.measured}"
    with pytest.raises(ValueError, match="did you mean 'MedCoT, greedy'"):
        outputs.judge(1, "MedCoT greedy", gains, prompts=200)


def test_what_is_measured_becomes_a_claim_without_a_verdict(root):
    outputs = Outputs("full", notebook="03_reward_curves")
    shown = outputs.measure("g", "G", "Fig. 4-1", "G is", Interval(0.5, 0.25, 0.75), 5, "of reward")
    assert shown == "G is: 0.5 [0.25, 0.75] of reward"
    outputs.measure("h", "G", "Fig. 4-1", "one seed: 0.5", Interval(0.5, math.nan, math.nan), 1)
    outputs.measure("i", "G", "Fig. 4-1", "nothing")
    found = load(root / "figures" / "claims.json")
    assert {(c.verdict, c.row, c.p) for c in found} == {("measured", None, None)}
    assert [c.seeds for c in found] == [5, 1, 0]
    assert [(c.estimate, c.low, c.high) for c in found] == [
        (0.5, 0.25, 0.75),
        (0.5, None, None),
        (None, None, None),
    ]


@pytest.mark.parametrize("name", ["claims", "Fig 4", "../x", ""])
def test_a_name_that_makes_no_good_file_is_refused(root, name):
    with pytest.raises(ValueError, match="small letters"):
        Outputs("smoke").figure(drawn(), name)
