"""Intervals against scipy.stats."""

import numpy as np
import pytest
from scipy import stats

from mdmrl.evaluation.stats import (
    auroc,
    calibration,
    ratio_interval,
    t_interval,
    wilson_interval,
    within_prompt_auroc,
)

A = np.array([0.9, 1.4, 0.2, 1.1, 0.7])
B = np.array([0.5, 0.9, 0.4, 0.8, 0.6])


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_t_intervals_equal_scipy(n, confidence):
    a = A[:n]
    expected = stats.ttest_1samp(a, 0).confidence_interval(confidence)
    assert t_interval(a, confidence) == pytest.approx((a.mean(), *expected))


def test_equal_values_have_an_interval_of_no_width():
    assert t_interval([2, 2, 2]) == (2, 2, 2)


def test_fieller_ends_are_where_the_t_test_says_so():
    interval = ratio_interval(A, B)
    assert interval.estimate == pytest.approx(A.mean() / B.mean())
    assert interval.low < interval.estimate < interval.high
    for end in interval[1:]:
        assert stats.ttest_1samp(A - end * B, 0).pvalue == pytest.approx(0.05)
    assert ratio_interval(2 * B, B) == pytest.approx((2, 2, 2))


def test_fieller_knows_nothing_when_the_denominator_may_be_zero():
    assert ratio_interval(A, B - B.mean())[1:] == (-np.inf, np.inf)
    assert np.isnan(ratio_interval([1, 2], [-1, 1]).estimate)


def test_wilson_equals_scipy():
    for successes, n in [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (90, 100), (499, 500)]:
        for confidence in (0.9, 0.95):
            test = stats.binomtest(successes, n)
            expected = test.proportion_ci(confidence, method="wilson")
            interval = wilson_interval(successes, n, confidence)
            assert interval == pytest.approx((successes / n, *expected), abs=1e-12)


def some_scores(n, seed=0):
    """Scores with many ties, and labels that they tell something of."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 5, n) / 4
    return scores, generator.random(n) < 0.2 + 0.6 * scores


def pairs_won(scores, positive):
    pairs = [(p, n) for p in scores[positive] for n in scores[~positive]]
    return np.mean([(p > n) + (p == n) / 2 for p, n in pairs])


@pytest.mark.parametrize("n", [5, 40])
def test_auroc_counts_pairs(n):
    scores, positive = some_scores(n)
    assert auroc(scores, positive) == pytest.approx(pairs_won(scores, positive))
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert auroc(scores, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))
    assert auroc(-scores, positive) == pytest.approx(1 - auroc(scores, positive))
    assert auroc([1, 1, 1], [True, False, True]) == 0.5
    assert np.isnan(auroc(scores, np.ones(n)))


def test_auroc_within_prompts_does_not_see_between_them():
    scores, positive = some_scores(48)
    prompts = [f"prompt {i % 6}" for i in range(48)]
    expected = [pairs_won(scores[i::6], positive[i::6]) for i in range(6)]
    assert within_prompt_auroc(scores, positive, prompts) == pytest.approx(expected)
    hard = np.repeat([0.0, 1.0], 20)  # knows the prompt alone
    right = np.random.default_rng(1).random(40) < 0.1 + 0.8 * hard
    assert auroc(hard, right) > 0.8
    assert within_prompt_auroc(hard, right, hard.tolist()).tolist() == [0.5, 0.5]
    # A prompt without a right text, or without a wrong one, says nothing.
    assert within_prompt_auroc([1, 2, 1, 2], [0, 1, 1, 1], [0, 0, 1, 1]).tolist() == [1.0]


def test_calibration_by_hand():
    predicted = [0.9, 0.1, 0.5, 0.3, 0.7]
    means, outcomes, counts = calibration(predicted, [1, 0, 0, 1, 1], 2)
    assert means == pytest.approx([0.3, 0.8])
    assert outcomes == pytest.approx([1 / 3, 1])
    assert counts.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([1]), "at least 2"),
        (lambda: t_interval([1, np.nan]), "finite"),
        (lambda: t_interval([[1, 2], [3, 4]]), r"shape \(2, 2\)"),
        (lambda: ratio_interval([1, 2], [1, 2, 3]), "2 and 3 values"),
        (lambda: auroc([], []), "at least 1"),
        (lambda: auroc([1, 2], [True]), "2 and 1 values"),
        (lambda: auroc([1, np.nan], [True, False]), "finite"),
        (lambda: within_prompt_auroc([1, 2], [True, False], ["x"]), "2 and 1 values"),
        (lambda: calibration([1, 2], [1, 2], 3), "at least 3"),
        (lambda: calibration([1, 2], [1, 2], 0), "bins=0"),
        (lambda: wilson_interval(3, 2), "3 of 2"),
        (lambda: wilson_interval(0, 0), "0 of 0"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
