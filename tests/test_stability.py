"""What the tables of stability say of runs."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from mdmrl.study import stability


def runs_of(rewards, seed=0, arm="A", losses=None):
    steps = len(rewards)
    frame = pd.DataFrame(
        {
            "arm": arm,
            "seed": seed,
            "step": range(steps),
            "reward": rewards,
            "rewards/depth/mean": np.array(rewards) / 4,
            "loss": losses or [0.0] * steps,
            "kl": np.arange(steps) * 2.0,
            "kl/max": np.arange(steps) * 5.0,
            "grad_norm": 1.0,
        }
    )
    last = pd.DataFrame({"arm": [arm], "seed": [seed], "step": [steps], "eval/reward": [2.0]})
    return pd.concat([frame, last], ignore_index=True)


def test_one_row_a_run():
    one, two = runs_of([1.8, 2.0, 2.3], losses=[0.0, 3.0, 6.0]), runs_of([2.0, 1.8], seed=1)
    found = stability.table(pd.concat([two, one]))
    assert found[["arm", "seed"]].values.tolist() == [["A", 1], ["A", 0]]
    second, first = found.to_dict("records")
    assert first["closed"] == pytest.approx(0.5 / 1.0)  # of 1.8 to 2.8
    assert second["gain"] == pytest.approx(-0.2)
    assert (first["gain/depth"], second["gain/depth"]) == pytest.approx((0.125, -0.05))
    assert (first["collapsed"], second["collapsed"]) == (False, True)
    assert (first["loss/std"], first["kl/std"], first["grad_norm/std"]) == (3, 2, 0)
    assert (first["kl/max"], second["kl/max"]) == (10, 5)


def test_correlations_are_those_of_each_seed():
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"seed": [1, 0] * 6, "x": generator.random(12), "y": generator.random(12)})
    expected = [spearmanr(*frame[frame.seed == seed][["x", "y"]].values.T)[0] for seed in (0, 1)]
    assert stability.correlations(frame, "x", "y") == pytest.approx(expected)
    assert np.isnan(stability.correlations(frame.assign(x=1), "x", "y")).all()
