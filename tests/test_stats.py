"""Intervals and tests against scipy.stats, closed forms and enumeration."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, stats

from mdmrl.evaluation.stats import (
    auroc,
    calibration,
    clustered_interval,
    holm,
    mcnemar,
    paired_interval,
    pass_at_k,
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


def test_one_completion_an_item_is_wilson():
    for right, n in [(0, 7), (3, 10), (7, 7)]:
        shares = [1] * right + [0] * (n - right)
        assert clustered_interval(shares, 1) == wilson_interval(right, n)
        # Whose completions are all alike tells no more than one of them.
        assert clustered_interval(shares, 8) == pytest.approx(wilson_interval(right, n))


def test_items_that_vary_as_independent_draws_count_as_these():
    """Of two completions each: n/4 items have none right, n/2 one, n/4 both."""
    shares = np.repeat([0, 0.5, 1], [10, 20, 10])
    assert clustered_interval(shares, 2) == pytest.approx(wilson_interval(40, 80))
    # Less spread than chance has is chance: items are never more than their completions.
    assert clustered_interval([0.5] * 40, 2) == pytest.approx(wilson_interval(40, 80))


def test_clustered_intervals_cover():
    """Items whose chances are 0.2, 0.5 or 0.8, four completions each: that the items are drawn
    again is in the interval, and the mean over all completions taken as independent is not."""
    rng = np.random.default_rng(0)
    chances = rng.choice([0.1, 0.5, 0.9], (1000, 60))
    shares = rng.binomial(4, chances) / 4
    ends = np.array([clustered_interval(row, 4) for row in shares])
    naive = np.array([wilson_interval(row.sum() * 4, 240) for row in shares])

    def covered(found):
        return ((found[:, 1] <= 0.5) & (found[:, 2] >= 0.5)).mean()

    assert 0.93 < covered(ends) < 0.97
    assert covered(naive) < 0.85


# -- pairs -----------------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_test():
    for b, c in itertools.product(range(9), repeat=2):
        expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected)
    # By counting: of the 2^6 ways in which six pairs differ, 14 are as lopsided as 1 to 5.
    ways = [sum(signs) for signs in itertools.product((0, 1), repeat=6)]
    assert mcnemar(1, 5) == sum(w in (0, 1, 5, 6) for w in ways) / 64 == 14 / 64


def score_statistic(b, c, n, difference):
    """(b - c - n d) over its standard deviation at the most likely q that has p - q = d, p being
    the chance of a pair that counts in the first share alone: the likelihood is maximised."""

    def loss(q):
        terms = ((b, q + difference), (c, q), (n - b - c, 1 - 2 * q - difference))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    bounds = max(0.0, -difference), (1 - difference) / 2
    q = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (0, 5, 30), (7, 7, 20), (40, 3, 60)])
def test_the_ends_of_a_paired_interval_are_where_the_score_test_says_so(b, c, n):
    estimate, low, high = paired_interval(b, c, n)
    assert estimate == (b - c) / n
    assert score_statistic(b, c, n, low) == pytest.approx(stats.norm.ppf(0.975), abs=1e-3)
    assert score_statistic(b, c, n, high) == pytest.approx(-stats.norm.ppf(0.975), abs=1e-3)
    assert paired_interval(c, b, n) == pytest.approx((-estimate, -high, -low))


def test_paired_intervals_in_closed_form():
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (1, 20, 500):
        end = z2 / (n + z2)
        assert paired_interval(0, 0, n) == pytest.approx((0, -end, end))
        assert paired_interval(n, 0, n) == pytest.approx((1, (n - z2) / (n + z2), 1))


def test_a_paired_interval_holds_0_where_mcnemar_without_correction_does_not_reject():
    for b, c in itertools.product(range(12), repeat=2):
        _, low, high = paired_interval(b, c, 40)
        rejected = (b - c) ** 2 > stats.chi2.ppf(0.95, 1) * (b + c)
        assert (low <= 0 <= high) == (not rejected)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.02], [0.2], [1, 0, 0.4]])
def test_holm_is_bonferroni_closed(p):
    """The largest p-value, each Bonferroni's, of a set of hypotheses that holds this one."""
    subsets = [s for k in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), k)]
    values = {s: min(1.0, len(s) * min(p[i] for i in s)) for s in subsets}
    expected = [max(v for s, v in values.items() if i in s) for i in range(len(p))]
    assert holm(p) == pytest.approx(expected)


def test_pass_at_k_counts_subsets():
    for n, right in [(5, 0), (5, 2), (6, 6), (1, 1)]:
        drawn = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            sets = list(itertools.combinations(drawn, k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(max, sets)) / len(sets))
    for n, right, k in [(1000, 3, 100), (2000, 1, 1), (500, 250, 3)]:
        exact = 1 - Fraction(math.comb(n - right, k), math.comb(n, k))
        assert pass_at_k(n, right, k) == pytest.approx(float(exact), rel=1e-12)


# -- scores ----------------------------------------------------------------------------------------


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
        (lambda: clustered_interval([0.5, 1.5], 2), "expected shares"),
        (lambda: clustered_interval([0.5], 0), "each=0"),
        (lambda: paired_interval(3, 2, 4), "3 and 2 of 4 items"),
        (lambda: mcnemar(-1, 2), "-1 and 2 of 1 items"),
        (lambda: holm([0.5, 1.5]), "expected p-values"),
        (lambda: pass_at_k(4, 5, 1), "5 right of n=4"),
        (lambda: pass_at_k(4, 1, 5), "k=5: expected 1 to n=4"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
