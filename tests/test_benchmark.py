"""The benchmark table of notebook 06: scores, contrasts, published numbers, one's own column."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from conftest import random_policy
from test_families import write_qwen

from mdmrl import load_task
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies.published import loading
from mdmrl.sampling import SamplerConfig
from mdmrl.study import benchmark, pieces
from mdmrl.study.outputs import project_root
from mdmrl.tasks import items
from mdmrl.tasks.base import Task

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_benchmark_tables.ipynb"


@pytest.fixture(autouse=True)
def results_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "study" / "notebooks").mkdir(parents=True)
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path / "study"))


def has_e(completion, row):
    return "e" in completion


def odd(prompts, completions, completion_ids, **columns):
    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]


def toy(name="toy", metric=has_e):
    rows = [{"prompt": f"Question {i}?"} for i in range(6)]
    splits = {"rl": rows, "test": rows}
    return Task(name, splits, [odd], metric, sampler={"max_new_tokens": 8, "steps": 8})


# ------------------------------------------------------------------ scores


def test_scores_are_those_of_the_evaluation_and_kept(any_policy, monkeypatch):
    any_policy.name, task = "zoo/any", toy()
    rows = task.rows("test")
    found = benchmark.scores(any_policy, task, rows, "quick", batch_size=4)
    sampler = SamplerConfig.from_dict(task.sampler_for(any_policy))
    means = evaluate(any_policy, rows, sampler, metric=has_e, batch_size=4)
    assert found["index"].tolist() == list(range(6))
    assert set(found.score) <= {0, 1} and found.score.mean() == pytest.approx(means["accuracy"])
    (path,) = pieces.pieces_folder("quick").glob("*.csv")
    assert path.name.startswith("any-toy-") and path.stat().st_size < 8 * len(rows)

    monkeypatch.setattr(benchmark, "evaluate_examples", lambda *_, **__: pytest.fail("again"))
    again = benchmark.scores(any_policy, task, rows, "quick", batch_size=4)
    pd.testing.assert_frame_equal(again, found)
    with pytest.raises(pytest.fail.Exception):
        benchmark.scores(any_policy, task, rows[:5], "quick", batch_size=4)


def test_a_summary_has_shares_in_percent_with_wilsons_interval():
    frame = pd.DataFrame({"row": "GSM", "column": "AR", "score": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]})
    (line,) = benchmark.summary(frame).to_dict("records")
    # By hand: centre (p + z^2/2n) / (1 + z^2/n), p = 0.3, n = 10, z = 1.96.
    assert (line["right"], line["n"]) == (pytest.approx(30), 10)
    assert (line["low"], line["high"]) == (
        pytest.approx(10.78, abs=0.01),
        pytest.approx(60.32, abs=0.01),
    )


def test_contrasts_count_the_items_that_only_one_has_right():
    right = {"A": [1, 1, 1, 1, 1, 1, 0, 0], "B": [0, 0, 0, 0, 0, 1, 1, 0], "C": [1, 0]}
    frame = pd.concat(
        pd.DataFrame({"row": "GSM", "column": name, "index": range(len(x)), "score": x})
        for name, x in right.items()
    )
    lines = benchmark.contrasts(frame, [("A", "B"), ("C", "A"), ("A", "D")])
    assert lines[["column", "minus"]].to_numpy().tolist() == [["A", "B"], ["C", "A"]]
    first, second = lines.to_dict("records")
    assert (first["gained"], first["lost"], first["change"]) == (5, 1, pytest.approx(50))
    assert first["low"] < 0 < 50 < first["high"]
    # Two-sided binomial: 2 (C(6,0) + C(6,1)) / 2^6.
    assert first["p"] == pytest.approx(2 * 7 / 64)
    assert (second["gained"], second["lost"], second["change"]) == (0, 1, pytest.approx(-50))


# ------------------------------------------------------------------ few-shot


def test_only_the_first_answer_of_a_few_shot_completion_is_read():
    task = load_task("gsm", n_shot=2)
    few, (row,) = benchmark.few_shot(task), task.rows("test", 1)
    answer = row["answer"]
    assert few.metric(f"\n2*2=4\n<answer>{answer}</answer>\n\nTom has", row)
    assert not few.metric(f"\n2*2=4\n\nTom has 3.\n<answer>{answer}</answer>", row)
    assert not few.metric(f"<answer>{answer}0</answer>\n\n<answer>{answer}</answer>", row)
    room = few.sampler["max_new_tokens"] - task.sampler["max_new_tokens"]
    assert room == few.sampler["steps"] - task.sampler["steps"] == benchmark.ROOM


# ------------------------------------------------------------------ tuned on one task


def test_tuning_on_one_task_scores_all_and_is_kept(policy, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "toy-policy")
    tasks = {"A": toy("a"), "B": toy("b", lambda text, row: "a" in text)}
    rows = {name: task.rows("test", 4) for name, task in tasks.items()}
    small = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 16}
    monkeypatch.setattr(benchmark, "TUNING", benchmark.TUNING.replace(**small, learning_rate=0.1))
    options = (str(tmp_path / "toy-policy"), "A", tasks, rows)
    found = benchmark.tuned_on(*options, 2, "quick")
    assert found[["row", "index"]].to_numpy().tolist() == [[r, i] for r in "AB" for i in range(4)]
    assert found.run[0].startswith("toy-policy-tuned-on-a-s0-")
    (folder,) = (project_root() / "runs" / "quick" / "grpo").iterdir()
    steps = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(steps) == 2

    monkeypatch.setattr(benchmark.grpo, "train_grpo", lambda *_: pytest.fail("again"))
    pd.testing.assert_frame_equal(benchmark.tuned_on(*options, 2, "quick"), found)
    with pytest.raises(pytest.fail.Exception):
        benchmark.tuned_on(*options, 3, "quick")
    with pytest.raises(ValueError, match="unknown row 'C'"):
        benchmark.tuned_on(options[0], "C", tasks, rows, 2, "quick")


# ------------------------------------------------------------------ published numbers


def test_published_numbers_are_the_thesis_s():
    """z of tuned minus base as worked out by hand for the thesis's Table 4-1."""
    thesis = benchmark.published().loc["the thesis"]
    by_hand = {"GSM": 0.97, "MATH": 0.39, "choice": -0.25}
    for row, expected in by_hand.items():
        pair = thesis.loc["tuned Dream 7B", row], thesis.loc["Dream 7B", row]
        z = benchmark.z_of_difference(*pair, benchmark.QUESTIONS[row])
        assert z == pytest.approx(expected, abs=0.005)
    behind = thesis.loc["tuned Dream 7B"] < thesis.loc["Qwen2.5 7B"]
    assert behind[behind].index.tolist() == ["MATH"]
    assert thesis.shape == (4, len(benchmark.ROWS))


# ------------------------------------------------------------------ a column of one's own

QUICK = {
    "profile": "quick",
    "items": 2,
    "few_shot_items": 2,
    "smollm2": "",
    "dtype": "float32",
    "shots": 1,
    "medcot_items": 1,
    "max_steps": 1,
    "tuned_on": [],
}
KINDS = {"tuned_mdm": "mdm", "mdm": "mdm", "bd": "bd", "ar": "ar", "tuned_ar": "ar"}


@pytest.fixture
def run_notebook(tmp_path, tokenizer, monkeypatch):
    """Executes the notebook's cells here, all of its policies random ones; returns what they
    define."""
    monkeypatch.setattr(items, "ROWS", {"pretrain": 2, "rl": 8, "test": 2})
    for kind in ("ar", "mdm", "bd"):
        random_policy(kind, tokenizer).save_pretrained(tmp_path / kind)
    zoo = {name: str(tmp_path / kind) for name, kind in KINDS.items()}
    zoo["plateau"] = [str(tmp_path / kind) for kind in ("mdm", "ar", "mdm", "ar")]

    def run(**parameters):
        space = {"display": lambda *_: None}
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, cell.id, "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space |= QUICK | zoo | parameters
        plt.close("all")
        return space

    return run


@pytest.mark.parametrize(
    "kind", ["ar", "mdm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bd", "Dream"))]
)
def test_a_policy_of_every_family_becomes_a_column(run_notebook, tmp_path, tokenizer, kind):
    (tmp_path / "mine").mkdir()
    folder = tmp_path / "mine" / kind
    if kind == "Dream":
        write_qwen(folder, "Dream", max_position_embeddings=1024)
    else:
        random_policy(kind, tokenizer, seed=1).save_pretrained(folder)
    space = run_notebook(policy=str(folder))
    table = pd.read_csv(space["outputs"].folder / "data" / "table_4_1.csv")
    own = table[table.column == kind]
    assert own.row.tolist() == [*benchmark.ROWS, "sudoku"] and (own.n == 2).all()
    others = table[table.column != kind]
    assert len(others) == len(benchmark.ROWS) * len(KINDS)
    policy = space["extra"][kind]
    assert policy.logit_shift == (kind in ("ar", "Dream"))
    for rows in space["asked_rows"].values():
        for row in rows:  # a worked example, an empty line, the question: continued as they stand
            assert row["prompt"].count("\n\n") == 1
            assert policy.encode([row["prompt"]]).input_ids.shape[1] < 1024
    for name in ("table_4_1", "planning_gap", "forgetting"):
        assert (space["outputs"].folder / f"{name}.png").stat().st_size > 10_000


def test_a_published_policy_fails_only_at_its_download(run_notebook, monkeypatch):
    """With its prompts made, and nothing scored for nothing."""
    name, made = "Dream-org/Dream-v0-Instruct-7B", []
    rows = Task.rows

    def noted(task, *arguments, **options):
        found = rows(task, *arguments, **options)
        made.append((task.name, found[0]["prompt"]))
        return found

    def unreachable(source):
        assert source == name
        with loading(source):
            raise OSError("the hub cannot be reached")

    monkeypatch.setattr(Task, "rows", noted)
    monkeypatch.setattr("mdmrl.policies.load.read_fields", unreachable)
    with pytest.raises(ValueError, match=f"{name} cannot be loaded: OSError: the hub"):
        run_notebook(policy=name)
    asked = dict(made)
    assert {f"{task}-few-shot" for task in benchmark.ROWS.values()} < asked.keys()
    assert "<answer>" in asked["gsm-few-shot"]
    assert not pieces.pieces_folder("quick").exists()


def test_what_tuning_on_one_task_changes_is_drawn(run_notebook, monkeypatch):
    small = {"per_device_train_batch_size": 8, "num_generations": 4}
    monkeypatch.setattr(benchmark, "TUNING", benchmark.TUNING.replace(**small))
    space = run_notebook(tuned_on=["choice"])
    changes = pd.read_csv(space["outputs"].folder / "data" / "forgetting.csv")
    assert changes.column.unique().tolist() == ["all four", "choice"]
    assert len(changes) == 2 * len(benchmark.ROWS)
