"""Fig. 5-2 against enumeration, and its pieces on a toy."""

import copy
import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from test_sampling import double

from mdmrl.evaluation.stats import bootstrap_interval
from mdmrl.runs import derived_seed, generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.study import narrowing
from mdmrl.study.narrowing import chosen_items, crossing, curves, solutions
from mdmrl.tasks.base import Task

ITEMS = [
    {"prompt": f"A patient has {x}.", "nums": [i, 2], "target": 3} for i, x in enumerate("abc")
]


def test_curves_are_means_over_all_sets_of_k_completions():
    written = {7: ["wrong", "a", "a", "b", "c", "wrong"], 2: ["wrong", "wrong", "a", "a", "a", "a"]}
    counted = [
        (item, solution, texts.count(solution))
        for item, texts in written.items()
        for solution in dict.fromkeys(texts)
    ]
    found = curves(pd.DataFrame(counted, columns=["item", "solution", "count"]), range(1, 7))
    for row in found.itertuples(index=False):
        sets = [
            {text for text in chosen if text != "wrong"}
            for chosen in itertools.combinations(written[row.item], row.k)
        ]
        assert row[2] == pytest.approx(np.mean([len(right) > 0 for right in sets]))
        assert row[3] == pytest.approx(np.mean([len(right) for right in sets]))
    assert len(found) == 12


def test_the_crossing_is_where_a_line_in_log_k_is():
    ks = [1, 2, 4, 8, 16]
    for where in (1.5, 2.0, 6.0, 12.0):
        ahead = np.log(where) - np.log(ks)
        noise = np.array([[0.3], [-0.3]])  # which both prompts' mean is rid of
        assert crossing(noise - ahead, noise * 0, ks) == pytest.approx(where)
    assert crossing(np.zeros((2, 5)), np.ones((2, 5)), ks) == np.inf
    assert crossing(np.ones((2, 5)), np.ones((2, 5)), ks) == np.inf
    assert crossing(np.ones((2, 5)), np.zeros((2, 5)), ks) == 1


def test_the_bootstrap_is_that_of_all_samples_with_replacement():
    x, y = np.array([0.0, 1.0, 5.0]), np.array([[1.0, 2.0], [2.0, 1.0], [4.0, 0.0]])

    def statistic(a, b):
        return float(a.mean() + b[:, 0].max())

    every = itertools.product(range(3), repeat=3)
    exact = np.sort([statistic(x[[*rows]], y[[*rows]]) for rows in every])
    found = bootstrap_interval(statistic, x, y, draws=20_000, confidence=0.7)
    assert found.estimate == statistic(x, y)
    assert found[1:] == pytest.approx(np.quantile(exact, [0.15, 0.85], method="nearest"))
    assert bootstrap_interval(lambda a: np.inf, x).high == np.inf
    with pytest.raises(ValueError, match="3 and 2 values"):
        bootstrap_interval(statistic, x, y[:2])


@pytest.fixture
def toy(mdm, tmp_path, monkeypatch):
    """A toy, and a task where completions with four "e" are right, one of two solutions."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    start = double(mdm)

    def reward(prompts, completions, **columns):
        return [float(text.count("e") > 3) for text in completions]

    splits = {split: partial(list, ITEMS) for split in ("rl", "test")}
    task = Task("toy", splits, [reward], lambda text, row: text.count("e") > 3)
    monkeypatch.setattr(narrowing, "load_policy", lambda name: copy.deepcopy(start))
    monkeypatch.setattr(narrowing, "load_task", lambda name: task)
    monkeypatch.setattr(
        narrowing, "countdown_solution", lambda text, nums: f"{nums[0]} {text.count('e') > 4}"
    )
    return start


def test_solutions_are_counted_of_the_items_asked_before_training_and_after(toy, monkeypatch):
    sampler = SamplerConfig(max_new_tokens=8, steps=4, temperature=1.0)
    monkeypatch.setattr(narrowing, "BETWEEN", (0.0, 0.99))
    chosen = chosen_items("toy", sampler, 2, 20, "smoke")
    assert chosen.item.is_monotonic_increasing
    assert chosen.right.between(0, 0.99).all()
    base = solutions("toy", sampler, [2, 0], 40, "smoke")
    assert base.groupby("item")["count"].sum().to_dict() == {2: 40, 0: 40}
    right = base[base.solution != "wrong"]
    assert all(row.solution.startswith(str(row.item)) for row in right.itertuples())
    tuned = copy.deepcopy(toy)
    with torch.no_grad():
        tuned.model.lm_head.weight.mul_(3.0)  # surer
    monkeypatch.setattr(narrowing, "facts", lambda profile, run: {"trained": tuned.fingerprint()})
    monkeypatch.setattr(narrowing, "trained_policy", lambda profile, run: tuned)
    after = solutions("toy", sampler, [2, 0], 40, "smoke", "a-run")
    prompts = [ITEMS[item]["prompt"] for item in (2, 0) for _ in range(40)]
    expected = generate(
        tuned, prompts, sampler, generator_for(derived_seed(0, "count"), "evaluate")
    )
    right = [text.count("e") > 3 for text in expected.completions]
    counts = after[after.solution != "wrong"].groupby("item")["count"].sum()
    assert counts.reindex([2, 0], fill_value=0).tolist() == [sum(right[:40]), sum(right[40:])]
    monkeypatch.setattr(narrowing, "trained_policy", lambda *_: pytest.fail("counted again"))
    again = solutions("toy", sampler, [2, 0], 40, "smoke", "a-run")
    pd.testing.assert_frame_equal(again, after)
    monkeypatch.setattr(narrowing, "BETWEEN", (2.0, 3.0))
    with pytest.raises(ValueError, match="0 of 3 items of toy have pass@1 in"):
        chosen_items("toy", sampler, 1, 20, "smoke")
