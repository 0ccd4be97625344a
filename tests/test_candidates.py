"""Candidates for what predicts an estimator's gain, against second ways to the same numbers."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from mdmrl import load_policy, load_task
from mdmrl.study import candidates, experiment
from mdmrl.study.parallel import right_solutions


@pytest.fixture(scope="module")
def setting():
    arm = experiment.arm("trajectory", 0, settings={"per_device_train_batch_size": 16})
    policy, task = load_policy(arm.policy, dtype="float32"), load_task("countdown")
    return policy, task, task.rows("validation", 3), arm.config(0).replace(learning_rate=1e-3)


def test_the_path_agrees_with_itself_and_the_policy_is_left_as_it_was(setting):
    policy, task, rows, config = setting
    asked = candidates.Candidates(batches=2, items=3)
    start = copy.deepcopy(policy.model.state_dict())
    found = candidates.measured(policy, task, rows, config, asked)
    assert found["cosine"] == pytest.approx(1, abs=1e-4) and found["norm"] == pytest.approx(
        0, abs=1e-4
    )
    assert -1 < found["cosine apart"] < 0.999
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, start[name]), name
    assert all(weight.grad is None for weight in policy.model.parameters())
    config = config.replace(logp_estimator="ar_style")
    other = candidates.measured(policy, task, rows, config, asked)
    assert abs(other["cosine"]) < 0.9 and other["effect"] != found["effect"]


def test_the_effect_is_that_of_a_signed_step(setting):
    """AdamW's first step moves every weight by the learning rate against the sign of its gradient
    (where that is far above its epsilon)."""
    policy, task, rows, config = setting
    config = config.replace(log_kl=False, log_gradients=False)
    sampler, kept, effects = config.sampler_for(policy), policy.model, []
    start, prompts = right_solutions(policy, rows, sampler).right.mean(), task.rows("rl")
    for batch in range(2):
        rollout = candidates._rollout(policy, task, prompts, config, sampler, batch)
        gradient = candidates._gradient(policy, rollout, "trajectory", config, batch)
        moved = copy.deepcopy(kept)
        parts = gradient.split([w.numel() for w in moved.parameters()])
        with torch.no_grad():
            for weight, part in zip(moved.parameters(), parts, strict=True):
                weight -= config.learning_rate * part.view_as(weight).sign()
        policy.model = moved
        effects.append(right_solutions(policy, rows, sampler).right.mean() - start)
        policy.model = kept
    asked = candidates.Candidates(batches=2, items=3)
    found = candidates.measured(policy, task, rows, config, asked)["effect"]
    assert effects[0] != effects[1] and found == pytest.approx(np.mean(effects), rel=0.1)


def test_an_empty_canvas_has_the_entropy_of_its_marginals(setting):
    policy, _, rows, _ = setting
    found = candidates.empty_canvas_entropy(policy, rows[:1], 12)
    prompt = policy.encode([rows[0]["prompt"]], 12).input_ids
    blank = torch.full((1, 12), policy.mask_token_id)
    with torch.no_grad():
        ids = torch.cat([prompt, blank], 1)
        logits = policy.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0, -12:]
    logits[:, policy.mask_token_id] = -torch.inf
    p = logits.double().softmax(-1).numpy()
    assert found == pytest.approx(-(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(), rel=1e-4)


def test_correlation_is_spearmans_and_its_interval_comes_from_arms_and_seeds():
    rng = np.random.default_rng(1)
    index = pd.MultiIndex.from_product([list("abcde"), range(6)], names=["arm", "seed"])
    level = np.repeat(np.arange(5), 6)
    noisy = level + rng.normal(size=30) * 0.1
    table = pd.DataFrame({"cosine": noisy, "gain": level**2.0}, index=index)
    found = candidates.correlation(table, "cosine", "gain")
    assert found.estimate == pytest.approx(spearmanr(noisy, level**2).statistic)
    assert found.low <= found.estimate <= found.high <= 1 and found.low > 0.5
    table["cosine"] = rng.normal(size=30)
    none = candidates.correlation(table, "cosine", "gain")
    assert none.low < 0 < none.high
    assert np.isnan(candidates.correlation(table.loc[["a", "b"]], "cosine", "gain").low)


def test_before_is_the_start_and_along_what_follows():
    log = {f"eval/{name}": [1.0, np.nan, 3.0, 5.0] for name in candidates.NAMES}
    runs = pd.DataFrame({"arm": "a", "seed": 0, "step": [0, 1, 2, 3], **log})
    gains = pd.Series([0.5], index=pd.MultiIndex.from_tuples([("a", 0)], names=["arm", "seed"]))
    found = candidates.beside(runs, gains).loc["a", 0]
    assert (found["cosine, before"], found["effect, along"], found.gain) == (1.0, 4.0, 0.5)
    assert candidates.beside(runs).equals(candidates.beside(runs, gains).drop(columns="gain"))
    assert candidates.beside(pd.DataFrame(), gains).empty and candidates.beside(runs[:0]).empty
