"""Claims and outputs: what is written, where, and that a crash or a second writer loses nothing."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mdmrl.study.ledger import Claim, fill_claims, load, record, render, slug
from mdmrl.study.outputs import Outputs, figures_folder, figures_of, project_root
from mdmrl.study.verdicts import fig41_ar_rises

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
        "verdict": "reproduced",
        "notebook": "03_reward_curves",
        "profile": "full",
    }
    return Claim.from_dict(facts | changes)


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    return tmp_path


# ------------------------------------------------------------------ the ledger


def test_recording_again_replaces_the_row_and_keeps_the_order(tmp_path):
    for row in (claim(id="b"), claim(id="a"), claim(id="b", verdict="contradicted")):
        path = record(row, tmp_path)
    assert [(row.id, row.verdict) for row in load(path)] == [
        ("a", "reproduced"),
        ("b", "contradicted"),
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
        ({"verdict": "reproducd"}, "did you mean 'reproduced'"),
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


def test_the_table_gives_number_interval_and_condition():
    rows = [
        claim(conditional=True, unit="points"),
        claim(says="a | b\nc", seeds=0, estimate=None, low=None, high=None, verdict="erratum"),
        claim(estimate=32_243_712, low=None, high=None, unit="parameters"),
    ]
    lines = render(rows).splitlines()
    assert lines[0] == "| Claim | Thesis | Measured here | Seeds | Verdict | Notebook |"
    link = "[03_reward_curves](../notebooks/03_reward_curves.ipynb)"
    assert lines[2] == (
        "| The AR model's mean reward rises | Fig. 4-1 | reward gained: 0.413 [0.32, 0.5] points "
        f"| 5 | reproduced, conditional on these checkpoints | {link} |"
    )
    assert lines[3] == rf"| a \| b c | Fig. 4-1 | reward gained | - | erratum | {link} |"
    assert "32,243,712 parameters |" in lines[4]


# ------------------------------------------------------------------ the page


def test_a_sentence_with_its_interval_is_left_as_it_is():
    said = "G is 0.413 [0.32, 0.5] (5 seeds)"
    assert f"| {said} |" in render([claim(measured=said)])
    assert f"| {said}: 0.413 [0.32, 0.51] |" in render([claim(measured=said, high=0.51)])


def test_the_page_gets_full_claims_only_and_again_the_same(tmp_path):
    page = tmp_path / "results.md"
    page.write_text(f"# Title\n\n{START}\nold\n{END}\n\nThe end.\n")
    fill_claims(page, tmp_path / "claims.json")
    assert page.read_text().startswith(f"# Title\n\n{START}\n\nNo `full` run")

    record(claim(), tmp_path)
    path = record(claim(id="z", says="a trial", profile="cpu"), tmp_path)
    fill_claims(page, path)
    once = page.read_text()
    assert "mean reward rises" in once
    assert "a trial" not in once
    assert "old" not in once
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
    path = outputs.data(frame, "reward")
    assert path == root / "figures" / "data" / "reward.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path), frame)

    done = outputs.claim(claim(notebook="", profile=""))
    assert (done.notebook, done.profile) == ("03_reward_curves", "full")
    assert load(root / "figures" / "claims.json") == [done]


def test_what_a_rule_says_becomes_a_claim(root):
    outputs = Outputs("full", notebook="03_reward_curves")
    verdict = fig41_ar_rises([0.1, 0.2, 0.3, 0.2, 0.1], [0.1] * 5)
    name = f"fig_4_1_{slug('MDM one_step, 16 steps')}"
    shown = outputs.judge(name, "It rises.", "Fig. 4-1", verdict, 5, "of reward")
    (found,) = load(root / "figures" / "claims.json")
    assert found.id == "fig_4_1_mdm_one_step_16_steps"
    assert (found.seeds, found.unit, found.conditional) == (5, "of reward", True)
    assert (found.estimate, found.low, found.high) == (verdict.estimate, verdict.low, verdict.high)
    assert shown == f"reproduced: {found.measured}"


@pytest.mark.parametrize("name", ["claims", "Fig 4", "../x", ""])
def test_a_name_that_makes_no_good_file_is_refused(root, name):
    with pytest.raises(ValueError, match="small letters"):
        Outputs("smoke").figure(drawn(), name)
