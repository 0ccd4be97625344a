"""Trackers get what the log gets, and are no part of what a run is."""

import sys
import types

import pytest
from conftest import Interrupted, random_policy

from mdmrl import DPOConfig, GRPOConfig, PPOConfig, SFTConfig, train_sft
from mdmrl.config import InputError
from mdmrl.runs import read_rows

SMALL = {"max_steps": 3, "per_device_train_batch_size": 2, "max_completion_length": 8}
ROWS = [{"prompt": "ab", "completion": "c"}] * 2


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request, monkeypatch):
    fake = types.ModuleType(request.param)
    fake.calls = []

    def noting(called):
        return lambda *given, **named: fake.calls.append((called, *given, named))

    fake.init, fake.log, fake.finish = map(noting, ("init", "log", "finish"))
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def test_rows_of_the_log_are_reported(tracker, tokenizer, tmp_path):
    config = SFTConfig(output_dir=str(tmp_path / "run"), report_to=tracker.__name__, **SMALL)
    train_sft(random_policy("mdm", tokenizer), ROWS, config, ROWS[:0])
    (begun, init), *logged, (ended, _) = tracker.calls
    assert (begun, ended) == ("init", "finish")
    assert init["project"] == "mdmrl" and init["resume"] == "allow"
    assert init["name"].startswith("run-") and init["config"]["learning_rate"] == 1e-4
    assert init.get("id") == (init["name"] if tracker.__name__ == "wandb" else None)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(name, row, how["step"]) for name, row, how in logged] == [
        ("log", {k: v for k, v in row.items() if v is not None}, row["step"]) for row in rows
    ]


def test_a_run_is_the_same_with_and_without_it(tracker, tokenizer, tmp_path):
    """It resumes under the other setting, and the tracker is let go where it is cut off."""
    policy, settings = random_policy("mdm", tokenizer), {"output_dir": str(tmp_path / "run")}
    for kind in (GRPOConfig, PPOConfig, DPOConfig, SFTConfig):
        plain, reported = kind(), kind(report_to=tracker.__name__)
        assert plain.settings_for(policy) == reported.settings_for(policy)
        assert "report_to" not in plain.settings_for(policy)
    train_sft(policy, ROWS, SFTConfig(**SMALL, **settings))
    longer = SFTConfig(**SMALL | {"max_steps": 5}, report_to=tracker.__name__, **settings)

    def cut(*_, step):
        tracker.calls.append("cut")
        if step == 4:
            raise Interrupted

    tracker.log = cut
    with pytest.raises(Interrupted):
        train_sft(random_policy("mdm", tokenizer), ROWS, longer)
    assert [call if call == "cut" else call[0] for call in tracker.calls] == [
        *("init", "cut", "cut", "finish")
    ]


def test_what_is_not_installed_or_known_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("mdmrl.training.config.find_spec", lambda name: None)
    with pytest.raises(InputError, match="report_to='trackio' needs its package: pip install"):
        GRPOConfig(report_to="trackio")
    with pytest.raises(InputError, match="unknown report_to 'tensorboard'"):
        DPOConfig(report_to="tensorboard")
    assert GRPOConfig().report_to == "none"
