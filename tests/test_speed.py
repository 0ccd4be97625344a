"""Speed against quality: what is counted, by hand."""

import math

import pandas as pd
import pytest
from scipy import stats

from mdmrl.evaluation.stats import wilson_interval
from mdmrl.study import speed
from mdmrl.tasks import Task


def lines(**columns):
    return pd.DataFrame({"sampler": speed.WHOLE, "seed": 0, "batch": 0, "reward": 1.0} | columns)


def test_samplers_at_few_steps_have_no_blocks():
    found = speed.samplers(16, [1, 4], block_length=8, thresholds=[0.9])
    assert [name for name, setting in found if setting == 1] == [speed.WHOLE]
    assert [name for name, setting in found if setting == 4] == [
        speed.WHOLE,
        "blocks",
        "blocks, prefix cache",
        "blocks, dual cache",
    ]
    assert found["blocks, threshold", 0.9].steps is None
    assert found["blocks, threshold, dual cache", 0.9].cache == "dual"


def test_block_diffusion_takes_no_fewer_steps_than_it_has_blocks():
    found = speed.block_samplers(16, [1, 4, 8], block_length=4, thresholds=[0.9])
    assert list(found) == [
        ("block diffusion", 4),
        ("block diffusion", 8),
        ("block diffusion, threshold", 0.9),
    ]
    assert found["block diffusion", 8].steps == 8
    assert found["block diffusion, threshold", 0.9].threshold == 0.9


def test_every_prompt_is_completed_by_every_sampler_with_every_seed(mdm):
    task = Task(
        name="letters",
        splits={},
        rewards=[lambda prompts, completions, **columns: [float(len(c)) for c in completions]],
        metric=lambda completion, row: row["n"] % 2 == 0,
    )
    rows = [{"prompt": f"question {n}", "n": n} for n in range(5)]
    configs = speed.samplers(4, [1, 2], block_length=2, thresholds=[])
    both = {key: (mdm, config) for key, config in configs.items()}
    found = speed.passes(both, task, rows, seeds=[3, 4], batch_size=2)
    assert len(found) == 5 * len(configs) * 2
    assert not found.duplicated(["sampler", "setting", "seed", "prompt"]).any()
    assert (found.batch == found.prompt // 2).all()
    assert (found.right == (found.prompt % 2 == 0)).all()
    assert (found.seconds > 0).all()
    whole = found[(found.sampler == speed.WHOLE) & (found.setting == 2) & (found.seed == 3)]
    assert whole[whole.batch == 0].nfe.sum() == pytest.approx(2)  # shares of its batch's passes
    table = speed.summary(found)
    assert table.accuracy.eq(0.6).all()
    assert (table.low[0], table.high[0]) == tuple(wilson_interval(6, 10))[1:]


def test_speed_is_compared_on_the_same_batch():
    ours = lines(setting=[1, 1, 2, 2], batch=[0, 1, 0, 1], seconds=[1.0, 3.0, 4.0, 4.0])
    other = lines(setting=9, batch=[0, 1], seconds=[2.0, 3.0])
    found = speed.log_speed_ratio(ours, other)
    expected = [[math.log(2), -math.log(2)], [0.0, -math.log(4 / 3)]]
    assert found.to_numpy() == pytest.approx(pd.DataFrame(expected).to_numpy())


def test_a_right_completion_costs_its_wrong_ones_too():
    ours = lines(setting=1, seed=[0, 0, 1, 1], right=[True, False, False, False], seconds=3.0)
    other = lines(setting=9, seed=[0, 0, 1, 1], right=[True, True, True, False], seconds=2.0)
    found = speed.log_cost_ratio(ours, other, "seconds")
    assert found[1].tolist() == [pytest.approx(math.log(6 / 2)), math.inf]


def test_the_cheapest_number_of_steps_is_the_best_of_many():
    spread = [-0.2, -0.1, 0.0, 0.1, 0.2]
    means = {1: math.inf, 8: 1.0, 16: -1.0, 32: 2.0}
    ratios = pd.DataFrame({steps: [mean + x for x in spread] for steps, mean in means.items()})
    steps, found = speed.cheapest(ratios)
    assert (steps, found.estimate) == (16, pytest.approx(-1))
    half = stats.t.ppf(1 - 0.025 / 4, 4) * stats.sem(spread)  # Bonferroni over four
    assert (found.low, found.high) == pytest.approx((-1 - half, -1 + half))
    ratios.loc[2, 16] = math.inf  # with one seed nothing was right
    assert speed.cheapest(ratios)[0] == 8
    assert speed.cheapest(ratios[[1]]) is None
    assert speed.cheapest(ratios[:1]) is None
