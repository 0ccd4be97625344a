"""The main experiment at its smallest: what a run is known by, and what it keeps item by item."""

import shutil

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mdmrl import SamplerConfig, generate, load_policy, load_task
from mdmrl.config import InputError
from mdmrl.study import experiment, plots
from mdmrl.study.figures.speed import moved
from mdmrl.study.looks import areas, looked, with_costs
from mdmrl.study.outputs import project_root
from mdmrl.study.pieces import facts
from mdmrl.study.speed import WHOLE

NAMES = ["trajectory", "trajectory-4-2"]
SMALL = {
    "looks": {"items": 4, "samples": 2, "steps": [2], "solutions": 2},
    "eval_prompts": 2,
    "settings": {"max_steps": 1, "per_device_train_batch_size": 32},  # fewer are all wrong
}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))


def test_a_stage_begins_with_the_weights_of_the_one_before():
    assert experiment.runs(NAMES, [0], "quick", train=False, **SMALL)[1] == [
        "trajectory on checkpoint 0",
        "trajectory-4-2 on checkpoint 0",
    ]
    found, missing = experiment.runs(NAMES, [0], "quick", **SMALL)
    assert missing == [] and found.step.tolist() == [0, 1, 0, 1]
    first, second = found.run[0], found.run[2]
    base = load_policy("tiny-mdm-countdown").weights_fingerprint()
    trained = facts("quick", first)["trained"]
    assert facts("quick", second)["identity"]["policy"] == trained
    assert facts("quick", first)["identity"]["policy"]["weights"] == base != trained["weights"]
    before, after = looked("quick", second, "before"), looked("quick", first, "after")
    assert before["steps2/accuracy"].tolist() == after["steps2/accuracy"].tolist()

    shutil.rmtree(project_root() / "runs" / "quick" / "grpo")  # reading does not need it
    again, _ = experiment.runs(NAMES, [0], "quick", train=False, **SMALL)
    pd.testing.assert_frame_equal(again, found)
    stage = experiment.arm("trajectory-4-2", 0, **SMALL).replace(eval_prompts=1)
    with pytest.raises(InputError, match="not on this machine"):
        experiment.train_arm(stage, 0, "quick")


def test_items_are_kept_one_by_one():
    found, _ = experiment.runs(["ar"], [0], "quick", **SMALL)
    before = looked("quick", found.run[0], "before")
    policy, task = load_policy("tiny-ar-countdown-matched"), load_task("countdown")
    rows = task.rows("test", 4)
    texts = generate(
        policy, [row["prompt"] for row in rows], SamplerConfig(max_new_tokens=12)
    ).completions
    right = [float(task.metric(text, row)) for text, row in zip(texts, rows, strict=True)]
    assert before["greedy/accuracy"].tolist() == right
    assert len(before["sampled/reward"]) == 4 and len(before["entropy"]) == 2
    for name, values in before.items():
        assert found[f"look/{name}"][0] == pytest.approx(values.mean(), abs=1e-3)


def test_a_checkpoint_that_is_not_shipped_is_missing():
    found, missing = experiment.runs(["ar-k3"], [2], "quick", **SMALL)
    shipped = experiment.pair(2)[0] in experiment.ZOO
    assert missing == ([] if shipped else ["ar-k3 on checkpoint 2 (unshipped)"])
    assert len(found) == (2 if shipped else 0)


def test_every_arm_can_be_made_and_has_a_name_of_its_own():
    for names in (experiment.COUNTDOWN_ARMS, experiment.MEDCOT_ARMS):
        labels = {experiment.arm(name, 0).name for name in names}
        assert len(labels) == len(names)
    prose = experiment.arm("medcot-one_step-free", 5)
    assert (prose.policy, prose.task, prose.rewards) == ("tiny-mdm", "medcot", {"faithful": False})
    settings = prose.config(5)
    assert settings.beta == 0 and settings.sampler["remasking"] == "low_confidence"
    assert experiment.arm("medcot-ar", 5).config(5).beta == 1
    assert experiment.label("trajectory-4-2-1") == "MDM trajectory, 1 step, after 2"
    with pytest.raises(InputError, match="trajectory"):
        experiment.arm("trajectry", 0)


def test_costs_and_areas_are_those_of_a_hand_made_log():
    log = pd.DataFrame(
        {
            "step": [0, 1, 2],
            "token_forwards": [10, 20, None],
            "token_forwards/scoring": [1, 2, None],
            "step_time": [3.0, 4.0, None],
            "rollout_time": [1.0, 1.0, None],
            "eval/accuracy": [0.1, None, 0.5],
        }
    )
    dear = log.assign(token_forwards=2 * log.token_forwards)
    runs = [part.assign(arm=arm, seed=7) for arm, part in (("one", log), ("other", dear))]
    runs = with_costs(pd.concat(runs, ignore_index=True))
    assert runs["spent/positions"].tolist() == [0, 11, 33, 0, 21, 63]
    assert runs["spent/rollout seconds"].tolist() == [0, 1, 2, 0, 1, 2]
    # Up to 30 positions of rollouts: a rise to 0.4 against one to 0.2, each linear from 0.
    found = areas(runs, ["one", "other"], "spent/rollout positions")
    assert found.loc[7].to_dict() == pytest.approx({"one": 0.4 / 2, "other": 0.2 / 2})


def test_accuracy_by_steps_is_of_the_start_and_of_the_end_of_each_stage():
    """And an arm whose runs lack is left out of the table and of the figure."""
    log = {"look/steps2/accuracy": [0.1, 0.3], "look/steps12/accuracy": [0.4, 0.5]}
    first = pd.DataFrame(log | {"name": "trajectory", "seed": 0, "step": [0, 300]})
    later = first.assign(name="trajectory-4-2", **{"look/steps2/accuracy": [0.3, 0.6]})
    table = experiment.by_steps(pd.concat([first, later]), [*NAMES, "trajectory-4-2-1"])
    found = table.pivot(index="curve", columns="steps", values="accuracy").T.to_dict("list")
    assert found == {
        "before RL": [0.1, 0.4],
        "MDM trajectory, 4 steps": [0.3, 0.5],
        "MDM trajectory, 2 steps, after 4": [0.6, 0.5],
    }
    speeds = pd.DataFrame({"sampler": WHOLE, "setting": [2, 12]})
    speeds["instances_per_second"] = [400.0, 80.0]
    peers = pd.DataFrame([{"name": "AR", "value": 0.45, "instances_per_second": 200.0}])
    figure = moved({"machine": "here"}, table, speeds, peers, "Countdown")
    against, fast = figure.axes
    curves = {line.get_label(): list(line.get_ydata()) for line in against.get_lines()}
    assert {name: curves[name] for name in found} == found and curves["AR"] == [0.45, 0.45]
    assert list(fast.get_lines()[0].get_xdata()) == [400, 80]


def test_dumbbells_go_from_before_to_after():
    index = pd.MultiIndex.from_product([["before", "after"], ["AR"], [0, 1]])
    values = pd.Series([0.1, 0.3, 0.5, 0.7], index.set_names(["end", "arm", "seed"]))
    _, axes = plt.subplots()
    plots.moved(axes, values, ["AR"])
    means = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "o"]
    assert means == pytest.approx([0.2, 0.6])
