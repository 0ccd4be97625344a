"""Runs that cannot be lost: killed at any moment, on a full disk, with files that went missing."""

import contextlib
import copy
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import Cut, Interrupted, nested, parity
from safetensors.torch import load_file

from mdmrl import GRPOConfig, SFTConfig, load_policy, train_grpo, train_sft
from mdmrl.config import InputError
from mdmrl.policies.export import export
from mdmrl.runs import NotWritten, Run, RunFolderError, read_rows

ROWS = [{"prompt": f"What is {i}?"} for i in range(4)]
LAST = 6


def start(base, folder, reward=None):
    """Train a copy of `base` to the end, or from where a run of that folder was left."""
    policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
    changes = {"steps": 2, "num_generations": 2, "per_device_train_batch_size": 4}
    changes |= {"save_steps": 1, "ref_model_sync_steps": 2, "learning_rate": 3e-3}
    config = GRPOConfig(
        output_dir=str(folder), max_steps=LAST, max_completion_length=6, **nested(changes)
    )
    train_grpo(policy, [reward or Cut()], ROWS, config)


def contents(folder):
    """Weights, reference and optimizer at the end, and the log without what it took."""
    found = folder / "checkpoints" / f"step-{LAST:06d}"
    tensors = load_file(found / "policy.safetensors")
    tensors |= {f"reference {n}": x for n, x in load_file(found / "reference.safetensors").items()}
    tensors |= {f"optimizer {n}": x for n, x in load_file(found / "optimizer.safetensors").items()}
    rows = read_rows(folder / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.endswith("_time")} for row in rows]
    return tensors, rows, read_rows(folder / "samples.jsonl")


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    assert found[1:] == expected[1:]


@pytest.fixture(scope="module")
def whole(shared_policies, tmp_path_factory):
    """What a run gives that nothing happens to, and how many seconds it takes."""
    folder, began = tmp_path_factory.mktemp("whole") / "run", time.perf_counter()
    start(shared_policies["mdm"], folder)
    return contents(folder), time.perf_counter() - began


SLOW = pytest.mark.slow


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "trial", [pytest.param(i, marks=SLOW if i >= 3 else ()) for i in range(20)]
)
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_bits(
    whole, shared_policies, tmp_path, trial
):
    expected, seconds = whole
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            start(shared_policies["mdm"], tmp_path / "run")
        os._exit(0)
    time.sleep(random.Random(trial).random() * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    start(shared_policies["mdm"], tmp_path / "run")
    assert_same(contents(tmp_path / "run"), expected)


@contextlib.contextmanager
def files_of_at_most(size):
    """A disk that takes no file of more bytes: a write beyond them fails as on a full one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk:
    """`parity`, on a disk that is full from its n-th call to its m-th."""

    __name__ = "parity"
    fingerprint = staticmethod(lambda: "parity")

    def __init__(self, size, first, last=None):
        self.calls, self.first, self.last = 0, first, last
        self.full, self.limit = contextlib.ExitStack(), files_of_at_most(size)

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.calls += 1
        if self.calls == self.first:
            self.full.enter_context(self.limit)
        if self.calls == self.last:
            self.full.close()
        return parity(prompts, completions, completion_ids)


def test_training_goes_on_while_the_disk_takes_no_checkpoint(whole, shared_policies, tmp_path):
    reward = FullDisk(20_000, first=3, last=5)
    with reward.full, pytest.warns(UserWarning, match=r"step-00000[34] cannot.*step 2 is the last"):
        start(shared_policies["mdm"], tmp_path / "run", reward)
    assert_same(contents(tmp_path / "run"), whole[0])


@pytest.mark.filterwarnings("ignore:.*cannot be written")
@pytest.mark.parametrize(("size", "file"), [(20_000, "step-000006"), (1, "metrics.jsonl")])
def test_a_disk_that_stays_full_ends_a_run_that_goes_on_later(
    whole, shared_policies, tmp_path, size, file
):
    reward = FullDisk(size, first=3)
    with reward.full, pytest.raises(NotWritten, match=rf"{file} cannot be written.*make room"):
        start(shared_policies["mdm"], tmp_path / "run", reward)
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["step-000002"]
    start(shared_policies["mdm"], tmp_path / "run")
    assert_same(contents(tmp_path / "run"), whole[0])


@pytest.fixture(scope="module")
def once_cut(shared_policies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(Interrupted):
        start(shared_policies["mdm"], folder, Cut(3))
    return folder


@pytest.fixture
def cut(once_cut, tmp_path):
    """The folder of a run that was cut off in its third update."""
    return shutil.copytree(once_cut, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "reference.safetensors", "manifest.json"]
)
def test_a_missing_part_of_the_only_checkpoint_is_said(cut, shared_policies, name):
    (cut / "checkpoints" / "step-000002" / name).unlink()
    with pytest.raises(RunFolderError, match=r"step-000002: a file is missing.*delete"):
        start(shared_policies["mdm"], cut)


def test_a_line_of_the_log_that_is_no_json_is_named(cut, shared_policies):
    path = cut / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, b'{"step": \xff\x00\n', *rest]))
    with pytest.raises(InputError, match=r"metrics.jsonl:2 is no JSON.*take the line out"):
        start(shared_policies["mdm"], cut)


def test_a_checkpoint_never_runs_code(cut, shared_policies, monkeypatch):
    """One of an older version, whose optimizer's state is a pickle that calls a function."""

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(cut / "ran"),)

    folder = cut / "checkpoints" / "step-000002"

    def write(aside):
        for name in ("policy.safetensors", "reference.safetensors"):
            shutil.copy(folder / name, aside)
        torch.save(Call(), aside / "optimizer.pt")

    with Run(cut, json.loads((cut / "config.json").read_text())) as run:
        run.save_checkpoint(3, write)
    with pytest.raises(RunFolderError, match=r"step-000003 has no optimizer.*delete .*checkpoints"):
        start(shared_policies["mdm"], cut)
    assert not (cut / "ran").exists()


def test_rows_of_the_log_that_went_missing_are_said(cut, shared_policies):
    (cut / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="metrics.jsonl lacks 2 of the rows of its 2 updates"):
        start(shared_policies["mdm"], cut)
    steps = [row["step"] for row in read_rows(cut / "metrics.jsonl")]
    assert steps == [*range(2, LAST + 1)]


def test_a_model_is_exported_whole_or_not_at_all(ar, tmp_path):
    with files_of_at_most(20_000), pytest.raises(NotWritten, match=r"out cannot be .*room"):
        export(ar, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
    export(ar, tmp_path / "out")
    assert load_policy(tmp_path / "out").fingerprint() == ar.fingerprint()


def test_a_cold_start_keeps_no_half_of_its_model(ar, tmp_path, monkeypatch):
    rows = [{"prompt": "a", "completion": "b"}]
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, max_completion_length=4)
    write = type(ar).save_pretrained

    def half(self, folder):
        write(self, folder)
        if "model" in str(folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    policies = [type(ar)(copy.deepcopy(ar.model), ar.tokenizer) for _ in range(2)]
    with monkeypatch.context() as patch, pytest.raises(NotWritten, match="model cannot be written"):
        patch.setattr(type(ar), "save_pretrained", half)
        train_sft(policies[0], rows, config)
    assert not (tmp_path / "run" / "model").exists()
    train_sft(policies[1], rows, config)
    assert load_policy(tmp_path / "run" / "model").kind == "ar"
