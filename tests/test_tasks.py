"""Tasks of one's own: from outside, in at most 15 lines, taken wherever a task is named."""

import json
import sys

import pandas as pd
import pytest
import yaml

from mdmrl import cli
from mdmrl.config import InputError
from mdmrl.runs import read_rows
from mdmrl.tasks import Task, load_task, medcot

ARITHMETIC = """
from mdmrl.tasks import Task

ROWS = [{"prompt": f"What is {a} plus {b}?", "sum": str(a + b)} for a in range(9) for b in range(9)]


def right(completions, sum, **columns):
    return [float(text.strip() == s) for text, s in zip(completions, sum)]


def digits(texts, token_ids):
    return {"digits": len([text for text in texts if text.strip().isdigit()]) / len(texts)}


arithmetic = Task("arithmetic", {"rl": ROWS[9:], "test": ROWS[:9]}, [right], watch=digits)
"""
FUNCTION = """
def made(size=3):
    return Task("made", {"rl": ROWS[:size]}, [right])


number = 3
"""
ROW = {"prompt": "What is one plus one?", "sum": "2"}
TASK = Task("mine", {"rl": [ROW] * 3, "validation": lambda: [ROW]})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(ARITHMETIC + FUNCTION)
    return path


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["mdmrl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_it_takes_at_most_15_lines():
    assert len([line for line in ARITHMETIC.splitlines() if line.strip()]) <= 15


def test_a_task_comes_from_a_file_a_function_or_as_it_is(file):
    task = load_task(f"{file}:arithmetic")
    assert (task.name, len(task.rows("rl")), len(task.rows("test"))) == ("arithmetic", 72, 9)
    assert len(load_task(f"{file}:made").rows("rl")) == 3
    assert len(load_task(f"{file}:made", size=5).rows("rl")) == 5
    assert load_task(TASK) is TASK
    assert load_task(lambda: TASK) is TASK
    assert load_task(medcot.task, faithful=False).rewards[1].__name__ == "capped_depth"


def test_a_split_is_a_list_or_a_function_and_only_those_asked_for_are_needed():
    assert TASK.rows("rl", 2) == [ROW] * 2
    assert TASK.rows("validation") == [ROW]
    with pytest.raises(InputError, match="unknown split of mine 'test': known: rl, validation"):
        TASK.rows("test")
    with pytest.raises(InputError, match="split 'rl' of none is empty"):
        Task("none", {"rl": list}).rows("rl")
    with pytest.raises(InputError, match="limit=-1: expected 1 or more rows"):
        TASK.rows("rl", -1)


def test_rows_of_ones_own_go_with_any_task(file, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join([json.dumps(ROW)] * 5))
    for task in (f"{file}:arithmetic", f"{file}:made", TASK):
        loaded = load_task(task, data=data)
        assert loaded.rows("rl") == loaded.rows("test") == [ROW] * 5
        assert "validation" not in loaded.splits  # nothing of it is held out
    data.write_text('{"question": "Why?"}')
    with pytest.raises(InputError, match=r"mine\.jsonl:1: field 'prompt' is missing"):
        load_task(TASK, data=data)


def test_what_is_no_task_is_named(file):
    for task, message in (
        (f"{file}:arithmetics", "unknown object in .* did you mean 'arithmetic'"),
        (f"{file}:number", "number.* is 3: expected a mdmrl Task"),
        (str(file), "expected FILE.py:NAME"),
        ("elsewhere.py:task", "there is no file elsewhere.py"),
        (
            "arithmetic",
            "unknown task 'arithmetic'.* known: FILE.py:NAME, choice, code, code",
        ),
        (3, "task 3 is 3: expected a mdmrl Task"),
        (lambda: None, "is None: expected a mdmrl Task"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(task)
    with pytest.raises(InputError, match="takes no options, got faithful"):
        load_task(TASK, faithful=False)


def test_the_command_line_takes_a_task_of_ones_own(monkeypatch, capsys, file, tmp_path):
    monkeypatch.chdir(tmp_path)
    table, task = tmp_path / "table.csv", f"{file}:arithmetic"
    options = ("--limit", 2, "--sampler", "max_new_tokens=8", "--csv", table)
    assert call(monkeypatch, "eval", "tiny-ar", "--task", task, *options) == 0
    assert "digits" in capsys.readouterr().out
    (row,) = pd.read_csv(table).to_dict("records")
    assert (row["task"], row["rewards/right/mean"]) == ("arithmetic", 0)
    missing = ("--split", "validation", *options)
    assert call(monkeypatch, "eval", "tiny-ar", "--task", task, *missing) == 2
    assert "unknown split of arithmetic 'validation': known: rl, test" in capsys.readouterr().err
    settings = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 8,
        "logp_estimator": "exact",
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    train = ("train", config, "--policy", "tiny-ar", "--task", task)
    assert call(monkeypatch, *train) == 0
    first, *_ = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert first["rewards/right/mean"] == 0
    assert first["digits"] == 0
    assert "format_rate" not in first


@pytest.mark.parametrize("splits", [None, [{"prompt": "x"}], "test"])
def test_splits_have_names(splits):
    with pytest.raises(InputError, match=r"task mine: splits=.*: expected rows by name"):
        Task("mine", splits)
