"""Run folders: random numbers, hashes, and what a crash leaves."""

import contextlib
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from mdmrl.config import InputError
from mdmrl.runs import (
    NotWritten,
    Run,
    RunFolderError,
    derived_seed,
    flushed_denormals,
    generator_for,
    write_atomically,
    written_aside,
)

CONFIG = {"learning_rate": 1e-4, "seed": 0, "sizes": [1, 2]}


# -- random numbers --------------------------------------------------------------------------------


def test_generators_are_reproducible_and_touch_nothing_global(rng_untouched):
    draws = [torch.rand(5, generator=generator_for(3, "noise", 7, 2)) for _ in range(2)]
    assert torch.equal(*draws)


def test_denormals_are_zero_inside_and_as_they_were_behind():
    def product():
        return (torch.full((), 1e-30) * 1e-10).item()

    assert product() > 0
    with pytest.raises(KeyError), flushed_denormals():
        assert product() == 0
        with flushed_denormals():
            assert product() == 0
        assert product() == 0
        raise KeyError
    assert product() > 0


def test_every_argument_changes_the_seed_and_none_runs_into_another():
    keys = [
        (seed, purpose, step, index)
        for seed in (0, 1, 11)
        for purpose in ("noise", "rollout", "noise/1")
        for step in (0, 1, 11)
        for index in (0, 1, 11)
    ]
    seeds = {derived_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_of_neighbouring_steps_are_independent():
    draws = torch.stack([torch.rand(50, generator=generator_for(0, "x", s)) for s in range(200)])
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.pearsonr(draws[:-1].flatten(), draws[1:].flatten()).pvalue > 1e-3
    assert stats.kstest(draws[:, 0].numpy(), "uniform").pvalue > 1e-3  # across generators


# -- the folder ------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    Run(tmp_path / "run", CONFIG)
    Run(tmp_path / "run", dict(CONFIG))  # the same run again
    with pytest.raises(FileExistsError, match=r"seed 0 -> 1.*output_dir"):
        Run(tmp_path / "run", CONFIG | {"seed": 1})
    with pytest.raises(FileExistsError, match="beta None -> 1"):
        Run(tmp_path / "run", CONFIG | {"beta": 1})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG


def test_only_max_steps_may_be_raised(tmp_path):
    config = CONFIG | {"max_steps": 5}
    Run(tmp_path / "run", config)
    with pytest.raises(RunFolderError, match=r"max_steps 5 -> 4.*only max_steps may be raised"):
        Run(tmp_path / "run", config | {"max_steps": 4})
    with pytest.raises(RunFolderError, match="seed 0 -> 1"):
        Run(tmp_path / "run", config | {"max_steps": 9, "seed": 1})
    Run(tmp_path / "run", config | {"max_steps": 9})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_steps"] == 9


def test_a_setting_that_came_later_is_at_what_it_was_before(tmp_path):
    """A folder of an older version lacks it; nested settings too."""
    old = CONFIG | {"sampler": {"steps": 4}}
    new = CONFIG | {"sampler": {"steps": 4, "order": 0.0}, "scale": "group"}
    since = {"sampler": {"order": 0.0}, "scale": "group"}
    Run(tmp_path / "run", old)
    Run(tmp_path / "run", new, since)
    with pytest.raises(RunFolderError, match="scale"):
        Run(tmp_path / "run", new | {"scale": "batch"}, since)
    with pytest.raises(RunFolderError, match="sampler"):
        Run(tmp_path / "run", new | {"sampler": {"steps": 4, "order": 0.5}}, since)


WRITER = """
import sys, time
from mdmrl.runs import Run
run = Run(sys.argv[1], {"seed": 0})
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "open\n"
        with pytest.raises(RunFolderError, match="another process is writing"):
            Run(folder, {"seed": 0})
        Run(folder, {"seed": 0}, writes=False)  # another rank of the same run
    finally:
        first.kill()
        first.wait()
    with Run(folder, {"seed": 0}) as run:
        with pytest.raises(RunFolderError, match="another process is writing"):
            Run(folder, {"seed": 0})
        run.log({"step": 0})
    Run(folder, {"seed": 0})


def test_what_is_no_number_is_null_in_the_log(tmp_path):
    """Strict JSON: another reader than Python's would stop at NaN."""
    run = Run(tmp_path / "run", CONFIG)
    run.log({"step": 0, "kl": math.inf, "parts": [1.0, math.nan], "none": None})
    run.log({"step": 1, "numpy": np.array([1, math.nan]), "torch": torch.tensor(2.5)})
    with pytest.raises(InputError, match=r"metrics.jsonl: Object of type object.*expected numbers"):
        run.log({"step": 2, "thing": object()})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 0, "kl": None, "parts": [1.0, None], "none": None},
        {"step": 1, "numpy": [1.0, None], "torch": 2.5},
    ]


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        Run(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_is_left_of_a_write_that_was_cut_off_is_no_other_file(tmp_path):
    (tmp_path / ".config.json.123").write_text("{")
    with Run(tmp_path, CONFIG):
        assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_the_environment_is_recorded(tmp_path):
    Run(tmp_path / "run", CONFIG)
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    assert found["threads"] == torch.get_num_threads()
    assert found["machine"]


def test_write_atomically_replaces_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two ü"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_cut_at_any_byte_give_the_complete_rows(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    assert run.logged() == []
    rows = [{"step": s, "text": f"ü\u2028\n{s}", "loss": s / 3} for s in range(4)]
    for row in rows:
        run.log(row)
    path = run.folder / "metrics.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert run.logged() == rows[: sum(end <= size for end in ends)]


def test_a_resumed_run_writes_over_the_cut_line(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    for step in range(4):
        run.log({"step": step})
        run.log({"step": step}, "samples")
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert not run.complete(3)
    run.rewind(2)
    for step in (2, 3):
        run.log({"step": step})
    assert [row["step"] for row in run.logged()] == [0, 1, 2, 3]
    assert [row["step"] for row in run.logged("samples")] == [0, 1]
    assert run.complete(3)


# -- checkpoints -----------------------------------------------------------------------------------

FILES = {"policy.bin": b"p" * 400, "optimizer.bin": b"o" * 300, "pretrained/config.json": b"{}"}


def fill(step):
    def write(folder):
        for name, content in FILES.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content + str(step).encode())

    return write


def is_whole(folder, step):
    return all((folder / n).read_bytes() == c + str(step).encode() for n, c in FILES.items())


def test_the_newest_checkpoint_takes_the_place_of_the_older(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    assert run.latest_checkpoint() is None
    for step in (1, 2, 10):
        run.save_checkpoint(step, fill(step))
        found, folder = run.latest_checkpoint()
        assert found == step
        assert is_whole(folder, step)
        assert [p.name for p in folder.parent.iterdir()] == [f"step-{step:06d}"]


@pytest.mark.parametrize("trial", range(20))
def test_a_damaged_checkpoint_is_never_given(tmp_path, trial):
    """Truncate or delete any file of the newest: the previous one is given, or it is said so."""
    rng = random.Random(trial)
    run = Run(tmp_path / "run", CONFIG)
    previous = run.save_checkpoint(1, fill(1))
    shutil.copytree(previous, tmp_path / "kept")
    newest = run.save_checkpoint(2, fill(2))
    keeps_previous = rng.random() < 0.5
    if keeps_previous:
        shutil.copytree(tmp_path / "kept", previous)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    victim = files[trial % len(files)]  # manifest.json among them
    if rng.random() < 0.3:
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])
    with pytest.warns(UserWarning, match=r"step-000002 is damaged"):
        if keeps_previous:
            step, folder = run.latest_checkpoint()
            assert step == 1
            assert is_whole(folder, 1)
        else:
            with pytest.raises(RunFolderError, match=r"step-000002.*delete"):
                run.latest_checkpoint()


DAMAGED = {"no object": b"[]", "null": b"null", "cut": b'{"seed": ', "nested": b"[" * 100_000}
DAMAGED |= {"bytes": b"\xff\x00", "empty": b""}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_files_of_a_run_that_are_damaged_are_named(tmp_path, content):
    run = Run(tmp_path / "run", CONFIG)
    manifest = run.save_checkpoint(1, fill(1)) / "manifest.json"
    run.close()
    for bad in (content, b"{}"):  # of no file all are there
        manifest.write_bytes(bad)
        with pytest.warns(UserWarning, match="damaged"), pytest.raises(RunFolderError):
            run.latest_checkpoint()
    (tmp_path / "run" / "config.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"config.json is damaged.*delete .*run to start"):
        Run(tmp_path / "run", CONFIG)


ROWS = {"a number": b"3", "a list": b"[]", "no step": b'{"loss": 1}', "text": b'{"step": "1"}'}
ROWS |= {"half": b'{"step": ', "bytes": b"\xff", "digits": b'{"step": ' + b"1" * 5000 + b"}"}


@pytest.mark.parametrize("line", ROWS.values(), ids=ROWS)
def test_a_line_that_is_no_row_of_a_run_is_named(tmp_path, line):
    run = Run(tmp_path / "run", CONFIG)
    run.log({"step": 0})
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    for use in (run.logged, lambda: run.complete(1), lambda: run.rewind(1)):
        with pytest.raises(InputError, match=r"metrics.jsonl:2 is no JSON row: .*take the line"):
            use()


def test_what_a_user_puts_beside_is_left_alone(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    first = run.save_checkpoint(1, fill(1))
    kept = [first.with_name("step-000001-kept"), first.with_name("step-best")]
    for folder in kept:
        shutil.copytree(first, folder)
    (first.parent / "notes.txt").write_text("mine")
    (run.folder / "mine.jsonl").write_text('{"mine": 1}\n')
    run.rewind(0)
    assert run.latest_checkpoint() == (1, first)
    run.save_checkpoint(1_000_000, fill(2))
    shutil.copytree(kept[0], first.with_name("step-999999"))
    assert run.latest_checkpoint()[0] == 1_000_000
    newest = run.save_checkpoint(1_000_001, fill(3))
    assert {*first.parent.iterdir()} == {*kept, first.parent / "notes.txt", newest}
    assert (run.folder / "mine.jsonl").read_text() == '{"mine": 1}\n'


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(NotWritten, match=r"no folder that can be written to.*output_dir"):
            Run(place, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NotWritten, match=r"environment.json cannot be written.*make room"):
            Run(tmp_path / "run", CONFIG)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    with Run(tmp_path / "run", CONFIG) as run:
        run.log({"step": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(NotWritten, match=r"metrics.jsonl cannot be written"):
                run.rewind(0)
        assert run.logged() == [{"step": 0}]


def test_a_folder_that_is_written_aside_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with written_aside(target) as aside:
            (aside / "weights").write_text(content)
        with pytest.raises(NotWritten, match="model cannot be written"):  # noqa: SIM117
            with written_aside(target) as aside:
                (aside / "weights").write_text("half")
                raise OSError(errno.ENOSPC, "No space left on device")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (target / "weights").read_text() == content


class Crash(BaseException):
    """What the operating system does, as far as Python can play it."""


@pytest.mark.parametrize("call", range(26))
def test_a_crash_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    """Cut `save_checkpoint` off at its n-th call to the file system."""
    run = Run(tmp_path / "run", CONFIG)
    run.save_checkpoint(1, fill(1))
    calls = 0

    def cut(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    def write(folder):
        for name, content in FILES.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                for byte in (content + b"2")[:50], (content + b"2")[50:]:
                    cut(file.write)(byte)

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, cut(getattr(os, name)))
        with contextlib.suppress(Crash):
            run.save_checkpoint(2, write)
    step, folder = run.latest_checkpoint()
    assert is_whole(folder, step)
    run.save_checkpoint(3, fill(3))  # and the run goes on
    assert run.latest_checkpoint()[0] == 3
    assert [p.name for p in folder.parent.iterdir()] == ["step-000003"]
