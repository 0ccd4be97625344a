"""V inside the rollouts of RL, on a toy task."""

from functools import partial

import pytest
import torch
from conftest import parity
from test_sampling import double

from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.logprobs import draw_noise, estimator
from mdmrl.rl.rollout import collect
from mdmrl.rl.values import fit_to_base
from mdmrl.runs import generator_for
from mdmrl.sampling import generate
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.sampling.guided import generate_guided
from mdmrl.study import judging, rejecting
from mdmrl.tasks.base import Task

ROWS = {
    split: [{"prompt": f"A patient has {x}. Why?"} for x in found]
    for split, found in {
        "rl": ("fever", "a rash", "pain", "nothing"),
        "validation": ("chills", "itching", "an ache", "less"),
        "test": ("sweat", "spots", "cramps", "more"),
    }.items()
}
CONFIG = GRPOConfig(
    max_completion_length=8,
    num_generations=4,
    per_device_train_batch_size=8,
    beta=0.0,
    sampler={"steps": 4},
)
GUIDE = GuideConfig(checks=[0.5], budget=2)


@pytest.fixture
def task(mdm, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    task = Task(
        "toy", {k: partial(list, v) for k, v in ROWS.items()}, [parity], lambda t, row: "e" in t
    )
    small = {"per_device_train_batch_size": 8, "num_generations": 1, "value_batches": 4}
    monkeypatch.setattr(rejecting, "FITTED_TO", small)
    for module in (rejecting, judging):
        monkeypatch.setattr(module, "load_policy", lambda name: double(mdm))
        monkeypatch.setattr(module, "load_task", lambda name: task)
    return task


def test_the_gradient_is_that_of_the_policy_gradient_theorem(mdm, task):
    policy = double(mdm)
    found = rejecting._mean_gradient(policy, task, CONFIG, "x", generate, 2)
    scorer, parameters = estimator("trajectory", policy), [*policy.trainable_parameters().values()]
    loss = 0.0
    for step in range(2):
        rows = rejecting.rows_of_step(ROWS["rl"], 2, step, 0, 1, 0)
        random, sampler = generator_for(0, "x", step), CONFIG.sampler_for(policy)
        rollout, *_ = collect(policy, rows, [parity], 4, sampler, random, record=True)
        rollout = rollout.whole()
        mask = rollout.completion_mask
        logp = scorer(policy, rollout, draw_noise(rollout, 0.0, random, 1, False))
        each = (logp * mask).sum(1) / mask.sum(1)
        loss = loss - (rollout.advantages * each).mean() / 2
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_pairs_of_gradients_are_compared(task):
    table = rejecting.selected_gradients("toy", CONFIG, GUIDE, 1, "smoke")
    pairs = [("plain", "plain again"), ("plain", "guided"), ("plain again", "guided")]
    assert [*zip(table["first"], table["second"], strict=True)] == pairs
    assert table.cosine.between(-1, 1).all()
    norms = table.norm.tolist()
    assert norms[1] == pytest.approx(norms[0] * norms[2], rel=1e-4)


def test_what_is_known_halfway_is_what_was_said_of_half_a_text(mdm, task):
    config = PPOConfig(
        max_completion_length=8,
        sampler={"steps": 4},
        value_batches=4,
        per_device_train_batch_size=4,
        num_generations=1,
    )
    table = judging.judged_halfway("toy", config, 3, 2, "smoke")
    policy, prompts = double(mdm), [row["prompt"] for row in ROWS["test"][:3] for _ in range(2)]
    values, _ = fit_to_base(policy, task.rewards, ROWS["rl"], config)
    features = []

    def judge(states):
        features.append(states.features)
        return torch.zeros(len(states.rows))

    every, drawn = GuideConfig(checks=None), generator_for(0, "base")
    sampler = config.sampler_for(policy)
    output = generate_guided(policy, prompts, sampler, every, judge, None, drawn, record=True)
    written = output.trajectory[:2]
    logp = torch.stack([step.logprobs.view(6, 2) for step in written]).mean((0, 2))
    assert table.logp.tolist() == pytest.approx(logp.tolist(), abs=1e-4)
    assert table.V.tolist() == pytest.approx(values(features[2]).tolist(), abs=1e-4)
    assert table.accuracy.tolist() == [float("e" in text) for text in output.completions]
    assert table.prompt.tolist() == [0, 0, 1, 1, 2, 2]
