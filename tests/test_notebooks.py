"""The notebooks' form, and the runner that executes them."""

import ast
import base64
import heapq
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from rich.console import Console

from mdmrl.study import progress
from mdmrl.study.figures import FIGURES
from mdmrl.study.notebooks import (
    code_cells,
    load_profile,
    notebook_parameters,
    plan,
    write_html,
)
from mdmrl.study.outputs import figures_folder
from mdmrl.study.progress import Progress, expected_seconds
from mdmrl.study.reproduce import reproduce, write_docs

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROFILES = ("smoke", "cpu", "full", "gpu", "paper")

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
    assert {name: ast.literal_eval(parameter["default"]) for name, parameter in seen.items()} == {
        name: parameter.value for name, parameter in notebook_parameters(path).items()
    }


@each_notebook
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_fits(path, profile):
    (job,) = plan(profile, [path.stem])
    assert job[0].stem == path.stem
    assert path.stem in load_profile(profile)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_with_question_answer_and_figure_and_closes_with_what_was_found(path):
    first, *cells = nbformat.read(path, as_version=4).cells
    question, answer, *rest = re.split(r"\n\n", first.source.partition("\n\n")[2])
    assert question.startswith("**Question.** ") and "?" in question
    assert answer.startswith("**Answer.** ")
    own = {name for name, of in FIGURES.items() if of.notebook == path.stem}
    if drawn := {name for name in own if (FOLDER.parent / "figures" / f"{name}.png").exists()}:
        assert re.fullmatch(r"!\[.+\]\(\.\./figures/(\w+)\.png\)", rest[0])[1] in drawn
    assert "(../docs/glossary.md)" in first.source
    last = [cell for cell in cells if "solution" not in cell.metadata.get("tags", [])]
    last = [cell.source for cell in last if not cell.source.startswith("## Exercises")][-2:]
    assert last[0].startswith("## What was found\n\n") and last[1] == "outputs.found()"


@pytest.mark.parametrize("name", ["00_tour", "04_kl_instability", "05_estimator_lab", "12_code"])
def test_three_exercises_end_it_with_their_solutions(name):
    """The questions with folded hints, then a folded cell for each, which runs with the others."""
    (path,) = FOLDER.glob(f"{name}*.ipynb")
    *_, questions, first, second, third = nbformat.read(path, as_version=4).cells
    assert questions.source.startswith("## Exercises")
    assert len(re.findall(r"^\*\*\d\.\*\* .*\?", questions.source, re.M)) == 3
    assert questions.source.count("<details><summary>Hint</summary>\n\n") == 3
    for number, cell in enumerate((first, second, third), start=1):
        assert cell.source.startswith(f"# Solution {number}. ")
        assert cell.metadata.jupyter.source_hidden


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
    """And their pages show static twins, where a widget would be an empty box."""
    assert reproduce("smoke") == 0
    pages = write_html("smoke")
    assert len(pages) == len(NOTEBOOKS)
    assert not any("widget-view" in page.read_text() for page in pages)


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
    """A checkout with one notebook, its page of results and its profiles."""
    write_notebook(tmp_path / "notebooks" / "00_fine.ipynb", FINE, WHERE)
    for profile in ("smoke", "full"):
        write_profile(tmp_path, "00_fine: {size: 5}", profile)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(f"{START}\n{END}\n")
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

    def run_notebook(path, output, parameters, cell_ends):
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
    monkeypatch.setattr("mdmrl.study.reproduce.package_digest", lambda: "another version")
    assert [again(), again()] == [1, 0]
    outcome = "a traceback"
    assert [again(force=True), again()] == [1, 1]  # a failure is never taken for done
    assert "unchanged" in capsys.readouterr().out


def test_a_full_run_writes_figures_and_docs(study, monkeypatch):
    def in_this_process(path, output, parameters, cell_ends):
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
    page = (study / "docs" / "results.md").read_text()
    assert "| it | here | [b]1[/b] of 2 | - | [00_fine](../notebooks/00_fine.ipynb) |" in page


@pytest.mark.parametrize("page", ["no markers", None])
def test_a_full_run_without_a_place_for_its_claims_does_not_start(study, monkeypatch, page):
    """Nor is the page made for them."""
    path = study / "docs" / "results.md"
    path.unlink() if page is None else path.write_text(page)
    monkeypatch.setattr("mdmrl.study.reproduce.run_notebook", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"docs/results\.md has no place for the claims"):
        reproduce("full")
    assert (path.read_text() if path.exists() else None) == page


def test_the_tables_in_docs_are_those_of_the_committed_figures(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    shutil.copytree(FOLDER.parent / "docs", tmp_path / "docs")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MDMRL_ROOT", str(tmp_path))
        write_docs(FOLDER.parent / "figures")
    for page in ("results.md", "bench.md"):
        written, committed = (root / "docs" / page for root in (tmp_path, FOLDER.parent))
        assert written.read_text() == committed.read_text()


def test_pages_of_executed_notebooks_need_no_other_file(study, monkeypatch):
    """A text's figure, the committed one, and an output's, that of the profile, are embedded, an
    output stands, and what needs a front end is not there."""
    pixels = {"figures": 3, "runs/smoke/figures": 5}
    for folder, width in pixels.items():
        (study / folder).mkdir(parents=True)
        Image.new("RGB", (width, 2)).save(study / folder / "drawn.png")
    executed = study / "runs" / "smoke" / "notebooks" / "00_fine.ipynb"
    write_notebook(executed, "Player()")
    notebook = nbformat.read(executed, as_version=4)
    notebook.cells[0].source = "![a picture](../figures/drawn.png), [words](../docs/results.md)"
    found = {"text/markdown": '<img src="../figures/drawn.png" width="160">'}
    twin = {"text/html": "<b>the static twin</b>"}
    notebook.cells[-1].outputs = [new_output("display_data", shown) for shown in (found, twin)]
    nbformat.write(notebook, executed)
    (page,) = write_html("smoke")
    assert page == study / "runs" / "smoke" / "html" / "00_fine.html"
    text = page.read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    drawn = (Image.open(io.BytesIO(base64.b64decode(data))) for data in embedded)
    assert [image.width for image in drawn] == [3, 5] and "drawn.png" not in text
    (link,) = re.findall(r'href="([^"]+results.md)"', text)
    assert (page.parent / link).resolve() == (study / "docs" / "results.md").resolve()
    assert "<b>the static twin</b>" in text and "widget-view" not in text
    with pytest.raises(ValueError, match="run mdmrl reproduce --profile cpu first"):
        write_html("cpu")


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


# ------------------------------------------------------------------ progress


def test_time_left_is_what_was_measured_times_the_pace_so_far(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress, "PRIOR", 10.0)
    said = Progress({"a": [10.0, 60.0, 30.0], "b": [200.0]}, clock=lambda: now)
    said.begin("a", "[1/2] a")
    assert said.left() == ({"a": 100}, 300)
    now = 30.0  # three times as long as expected: (10 + 30) / (10 + 10) as slow
    said.cell_ends("a")
    assert said.left() == ({"a": 2 * 90}, 2 * 290)
    now = 90.0
    assert said.left() == ({"a": 2 * 90 - 60}, 2 * 290 - 60)
    assert said.lines() == [
        "[1/2] a: cell 2 of 3, 1 min 30 s, about 2 min left; whole: about 9 min left"
    ]
    now = 300.0  # the cell should have ended at 150: the pace is (40 + 270) / (20 + 60)
    own, whole = said.left()
    assert (own["a"], whole) == pytest.approx((310 / 80 * 30, 310 / 80 * 230))
    said.cell_ends("a")
    said.cell_ends("a")
    assert said.end("a") == (300, [30, 270, 0])
    said.begin("b", "[2/2] b")
    now = 10_000.0
    assert "under a minute left" in said.lines()[0]  # long overdue, and never below nothing


def test_time_left_of_two_at_a_time_is_when_the_later_one_ends(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress, "PRIOR", 1e9)  # the machine is as fast as the one that was timed
    expected = {"a": [100.0], "b": [30.0, 30.0], "c": [50.0], "d": [20.0]}
    said = Progress(expected, 2, clock=lambda: now)
    said.begin("a", "[1/4] a")
    assert said.left()[1] == pytest.approx(120)  # a, then d; beside them b, then c
    said.begin("b", "[2/4] b")
    now = 30.0
    said.cell_ends("b")
    assert said.left() == (pytest.approx({"a": 70, "b": 30}), pytest.approx(90))
    assert [line[:7] for line in said.lines()] == ["[1/4] a", "[2/4] b"]
    now = 60.0
    said.cell_ends("b")
    said.end("b")
    assert said.left() == (pytest.approx({"a": 40}), pytest.approx(60))


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("machine", [0.4, 1.0, 3.0])
def test_time_left_is_right_within_a_factor_of_two_from_a_quarter_on(
    results_elsewhere, machine, at_once
):
    """In nine of ten runs, by a clock on which every notebook takes its committed seconds, times
    what is the machine's, times what is its own, spread over its cells otherwise than expected."""
    expected = expected_seconds("cpu", {path.stem: code_cells(path) for path in NOTEBOOKS})
    right = {share: 0 for share in (0.25, 0.4, 0.5, 0.75)}
    for seed in range(20):
        draw, taken = random.Random(seed), {}
        for name, cells in expected.items():
            shares = [draw.expovariate(1) for _ in cells]
            whole = sum(cells) * machine * draw.lognormvariate(0, 0.4)
            taken[name] = [whole * share / sum(shares) for share in shares]
        events, free = [], [0.0] * at_once  # what happens when
        for name, cells in taken.items():
            begins = heapq.heappop(free)
            events.append((begins, "begin", name))
            ends = [begins + sum(cells[: index + 1]) for index in range(len(cells))]
            events += [(end, "cell_ends", name) for end in ends] + [(ends[-1], "end", name)]
            heapq.heappush(free, ends[-1])
        whole, now = max(free), 0.0
        asked = [(whole * share, "ask", share) for share in right]
        said = Progress({**expected}, at_once, clock=lambda: now)  # noqa: B023
        for now, what, about in sorted(events + asked, key=lambda event: event[0]):
            if what == "ask":
                right[about] += 0.5 < said.left()[1] / (whole - now) < 2
            else:
                getattr(said, what)(*[about] * (1 + (what == "begin")))
    assert min(right.values()) >= 18, right


def test_estimates_are_the_last_runs_then_the_committed_ones(study):
    cells = {"00_fine": 3, "01_new": 4}
    assert expected_seconds("smoke", cells) == {"00_fine": [20.0] * 3, "01_new": [15.0] * 4}
    committed = {"smoke": {"00_fine": [1, 2, 3], "01_new": [6, 6]}}
    (study / "notebooks" / "profiles" / "seconds.json").write_text(json.dumps(committed))
    assert expected_seconds("smoke", cells) == {"00_fine": [1, 2, 3], "01_new": [3.0] * 4}
    progress.record_seconds("smoke", "00_fine", [4.04, 5.0, 6.0])
    assert expected_seconds("smoke", cells) == {"00_fine": [4.0, 5.0, 6.0], "01_new": [3.0] * 4}
    assert expected_seconds("cpu", {"00_fine": 1}) == {"00_fine": [60.0]}


@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_every_notebook_has_a_committed_estimate(profile):
    committed = json.loads((FOLDER / "profiles" / "seconds.json").read_text())[profile]
    assert committed.keys() == {path.stem for path in NOTEBOOKS}


def test_what_runs_is_said_again_and_again(study, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.3)
    write_notebook(study / "notebooks" / "00_fine.ipynb", "import time", "time.sleep(2)")
    assert reproduce("smoke") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("[1/1] 00_fine: cell")]
    form = r"\[1/1\] 00_fine: cell \d of 4, \d+ s, .* left; whole: .* left"
    assert len(lines) > 5 and all(re.fullmatch(form, line) for line in lines)
    assert any("cell 4 of 4" in line for line in lines)
    (taken,) = json.loads((study / "runs" / "smoke" / "seconds.json").read_text()).values()
    assert len(taken) == code_cells(study / "notebooks" / "00_fine.ipynb") == 4
    assert 2 <= taken[-1] < 5


def test_notebooks_run_two_at_a_time(study, capsys):
    """Each waits for a file that the other writes, and neither has more than its half of cores."""
    for own, other in (("00_fine", "01_other"), ("01_other", "00_fine")):
        write_notebook(
            study / "notebooks" / f"{own}.ipynb",
            "import os, pathlib, time",
            f"pathlib.Path('{own}').write_text(os.environ['OMP_NUM_THREADS'])",
            f"while not pathlib.Path('{other}').exists():\n    time.sleep(0.1)",
            f"assert os.environ['MDMRL_NOTEBOOK'] == '{own}'",
        )
    write_profile(study, "00_fine:\n01_other:")
    assert reproduce("smoke", jobs=2) == 0
    assert (study / "notebooks" / "01_other").read_text() == os.environ.get(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2))
    )
    said = capsys.readouterr().out
    assert said.index("[2/2] 01_other: started") < said.index("[1/2] 00_fine: done")
    with pytest.raises(ValueError, match="--jobs 0: expected at least 1"):
        reproduce("smoke", jobs=0)


def test_on_a_terminal_one_line_changes(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda: Console(file=screen, force_terminal=True, width=90)
    )
    with Progress({"a": [120.0]}) as said:
        said.begin("a", "[1/1] a")
        time.sleep(1.5)
    shown = screen.getvalue()
    assert "[1/1] a: cell 1 of 1, 1 s, about 2 min left" in shown
    assert "\x1b[2K" in shown  # each in the place of the one before


def test_ctrl_c_ends_the_kernel_says_how_to_go_on_and_keeps_what_is_done(study):
    waits = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))"
    write_notebook(study / "notebooks" / "01_slow.ipynb", waits, "time.sleep(600)")
    write_profile(study, "00_fine:\n01_slow:")
    command = [sys.executable, "-m", "mdmrl", "reproduce", "--profile", "smoke", "--only", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        pid = study / "notebooks" / "pid"
        while not pid.exists() or not pid.read_text():
            assert running.poll() is None
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        text = running.communicate(timeout=30)[0]
    assert running.returncode == 130
    assert text.endswith("To go on: mdmrl reproduce --profile smoke --only 0\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    done = json.loads((figures_folder("smoke").parent / "done.json").read_text())
    assert done.keys() == {"00_fine"}
