"""The verdict rules, second edition, on either side of every bound."""

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from mdmrl.study import quantities
from mdmrl.study.verdicts import ROWS, inference, learning, row_of

# Five seeds around 0 whose mean has a 95 % t-interval of exactly -1 to 1.
UNIT = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
UNIT /= stats.sem(UNIT) * stats.t.ppf(0.975, 4)
ONES = np.ones(5)
ENOUGH = {"prompts": 200}


def around(mean, half):
    return mean + half * UNIT


def items(mean, n=400):
    """n paired differences of 1, 0 and -1 with this mean, four in ten of them not 0."""
    up = round(n * (0.4 + mean) / 2)
    found = np.zeros(n)
    found[:up], found[up : round(0.4 * n)] = 1, -1
    return found


# -- Quantities ---------------------------------------------------------------------------------


def test_gain_and_headroom():
    assert quantities.gain([1, 2]) == 1
    assert quantities.gain([0, 5, 5, 5, 1]) == 1  # at least one step each
    curve = [0, 1] + [9] * 16 + [2, 4]
    assert quantities.gain(curve) == 2.5
    assert quantities.headroom(curve, 2.8) == pytest.approx(2.3)
    with pytest.raises(ValueError, match=r"starts at 0\.5, not below its ceiling 0\.5"):
        quantities.headroom(curve, 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        quantities.gain([1])


def test_updates_to():
    updates_to = quantities.updates_to
    step = [0.0] * 20 + [1.0] * 20
    assert updates_to(step) == 25  # the first five updates all at the new level
    assert updates_to(step, window=1) == 21
    assert updates_to(step, share=0.5) == 23
    ramp = list(range(41))
    # From 1.5 to 38.5; 90 % is 34.8; the window ending at value v averages v - 2.
    assert updates_to(ramp) == 38
    assert updates_to([0, 1]) == 2  # the window cannot be longer than the curve
    assert updates_to([1.0] * 20 + [0.0] * 20) == 40  # fell: never on its way
    assert updates_to([1.0] * 40) == 40


def test_kl_ratio_is_a_median_over_updates_with_a_surrogate():
    assert quantities.kl_ratio([1, 8, 3, 9], [1, 2, 1, 0]) == 3
    assert np.isnan(quantities.kl_ratio([1, 2], [0, 0]))


def test_the_law_is_that_of_the_first_updates():
    assert quantities.law([0, 1, 2, 3, 4, 50, 60]) == 2
    assert quantities.law([3.0]) == 3


def test_the_kl_at_a_reward_is_read_off_the_first_time_it_is_reached():
    kl_at = quantities.kl_at
    assert kl_at(1.5, [1.0, 2.0, 1.2, 3.0], [0.0, 4.0, 5.0, 9.0]) == 2.0
    assert kl_at(3.0, [1.0, 2.0, 1.2, 3.0], [0.0, 4.0, 5.0, 9.0]) == 9.0
    assert np.isnan(kl_at(3.1, [1.0, 3.0], [0.0, 4.0]))
    assert np.isnan(kl_at(1.0, [1.0, 3.0], [0.0, 4.0]))  # nothing was learnt, nothing spent


def test_collapsed():
    assert quantities.collapsed([2.0] * 10 + [1.89] * 10)
    assert not quantities.collapsed([2.0] * 10 + [1.91] * 10)


def test_held_out_gain_is_paired_by_prompt():
    before, after = [0.5, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 0.5]
    assert quantities.held_out_gain(before, after) == pytest.approx(0.375)
    assert quantities.held_out_share(before, after, 1.0) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="expected one a prompt in each"):
        quantities.held_out_gain(before, after[:3])
    with pytest.raises(ValueError, match=r"start is 0\.5, not below its ceiling 0\.5"):
        quantities.held_out_share(before, after, 0.5)


def test_the_area_under_a_gain():
    # 0 to 4 rising to 2, then flat: by 6 the area is 4 + 4.
    assert quantities.mean_until([0, 4, 10], [0, 2, 2], 6) == pytest.approx(8 / 6)
    assert quantities.mean_until([0, 4, 10], [0, 2, 2], 2) == pytest.approx(0.5)
    for cost, end in (([0, 4, 10], 11), ([0, 4, 4], 4), ([2, 4, 10], 2)):
        with pytest.raises(ValueError, match="expected a rising list that reaches it"):
            quantities.mean_until(cost, [0, 2, 2], end)


def test_log_odds_exist_at_the_ends():
    assert quantities.log_odds([0.5] * 50) == 0
    assert quantities.log_odds([1.0] * 50) == pytest.approx(math.log(50.5 / 0.5))
    assert quantities.log_odds([0.0] * 50) == -quantities.log_odds([1.0] * 50)


def test_a_plateau_needs_items_and_a_small_gain():
    assert quantities.at_plateau(2000, 2099, 5000)
    assert quantities.at_plateau(2000, 1900, 5000)
    assert not quantities.at_plateau(2000, 2100, 5000)
    assert not quantities.at_plateau(2000, 2000, 4999)


# -- The table ----------------------------------------------------------------------------------


def test_the_table_has_the_rows_that_are_marked():
    assert [row.number for row in ROWS] == list(range(1, 22))
    trained = {row.number for row in ROWS if row.trained}
    assert trained == {1, 2, 3, 4, 6, 7, 8, 13, 15, 16, 17, 18, 20}
    for row in ROWS:
        assert len(set(row.lines)) == len(row.lines) > 0
    assert row_of(21) is ROWS[20]
    with pytest.raises(ValueError, match=r"unknown row 22"):
        row_of(22)
    with pytest.raises(ValueError, match="did you mean 'Countdown'"):
        row_of(7).require_line("countdown")


# -- What all rules do --------------------------------------------------------------------------

# Row, and columns of a case with clear evidence for the claim; the same reversed is against it.
SEEDED = {
    1: (ONES,),
    3: (ONES,),
    6: (-ONES,),
    16: (2 * ONES, ONES),
}


@pytest.mark.parametrize("number", SEEDED)
@pytest.mark.parametrize(
    ("half", "sign", "verdict"),
    [
        (0.99, 1, "reproduced"),
        (1.01, 1, "inconclusive"),
        (1.01, -1, "inconclusive"),
        (0.99, -1, "contradicted"),
    ],
)
def test_one_bound_at_0(number, half, sign, verdict):
    first, *others = SEEDED[number]
    difference = first - sum(others) if others else first
    columns = (sign * difference + half * UNIT + sum(others), *others)
    facts = ENOUGH if number != 3 and number != 6 else {}
    found = row_of(number).rule(*columns, **facts)
    assert found.verdict == verdict
    assert (found.p < 0.05) == (verdict == "reproduced")
    expected = sign * difference[0]
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (expected, expected - half, expected + half)
    )


def test_p_is_twice_the_one_sided_one_of_the_claims_direction():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.35])
    ar_improves = learning.ar_improves
    two_sided = stats.ttest_1samp(values, 0).pvalue
    assert ar_improves(values, **ENOUGH).p == pytest.approx(two_sided)
    assert ar_improves(-values, **ENOUGH).p == 1


@pytest.mark.parametrize("seeds", [1, 2, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_fewer_than_five_seeds_decide_nothing(seeds, sign):
    found = learning.ar_improves(sign * np.linspace(10, 11, seeds), **ENOUGH)
    assert (found.verdict, found.p) == ("inconclusive", 1)
    assert f"({seeds} seed{'s' * (seeds > 1)}, needs 5 seeds)" in found.measured
    assert (found.low is None) == (seeds == 1)


def test_fewer_than_200_held_out_prompts_decide_nothing():
    assert learning.ar_improves(around(9, 1), prompts=200).verdict == "reproduced"
    for few in ({}, {"prompts": 199}):
        found = learning.ar_improves(around(9, 1), **few)
        assert (found.verdict, found.p) == ("inconclusive", 1)
        assert "needs 200" in found.measured


def test_seeds_of_one_checkpoint_are_one_cluster():
    # Twelve seeds on six checkpoints, the checkpoints far apart: not twelve independent ones.
    means = np.array([-1.0, 0.0, 1.0, 1.0, 2.0, 3.0])
    gains = np.repeat(means, 2) + np.tile([0.1, -0.1], 6)
    clustered = learning.ar_improves(gains, checkpoints=np.repeat(range(6), 2), **ENOUGH)
    expected = stats.ttest_1samp(means, 0)
    assert clustered.p == pytest.approx(expected.pvalue)
    assert clustered.low == pytest.approx(expected.confidence_interval().low)
    assert (clustered.seeds, clustered.conditional) == (6, False)
    assert clustered.measured.endswith("(6 checkpoints)")
    assert learning.ar_improves(gains, **ENOUGH).conditional
    assert learning.ar_improves(gains, **ENOUGH).p < expected.pvalue
    few = learning.ar_improves(gains, checkpoints=np.repeat(range(4), 3), **ENOUGH)
    assert few.conditional and "needs 5 checkpoints" in few.measured


def test_a_seed_without_a_finite_number_decides_nothing():
    values = around(9, 1)
    values[2] = np.nan
    found = learning.ar_improves(values, **ENOUGH)
    assert (found.verdict, found.p, found.estimate, found.low) == ("inconclusive", 1, None, None)


def test_columns_must_hold_the_same_seeds():
    with pytest.raises(ValueError, match=r"'area_mdm': 5, 'area_ar': 4"):
        learning.samples_faster(ONES, ONES[:4], **ENOUGH)
    with pytest.raises(ValueError, match="expected one a seed"):
        learning.ar_improves([], **ENOUGH)
    with pytest.raises(ValueError, match="4 checkpoints of 5 values"):
        learning.ar_improves(ONES, checkpoints="abcd", **ENOUGH)


def test_nothing_is_found_where_nothing_is_in_more_than_one_case_of_twenty():
    draw = np.random.default_rng(0)
    gains = [learning.ar_improves(draw.normal(size=6), **ENOUGH) for _ in range(2000)]
    right = [draw.random((2, 250)) < 0.5 for _ in range(500)]
    pairs = [inference.rl_helps(*pair) for pair in right]
    tables = [learning.stability_needs_steps([4, 16, 64], draw.random((5, 3))) for _ in range(500)]
    for found in (gains, pairs, tables):
        for word in ("reproduced", "contradicted"):
            assert np.mean([v.verdict == word for v in found]) <= 0.05
    assert any(v.verdict == "reproduced" for v in gains)


# -- Rows of training ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.14, "reproduced"), (0.16, "inconclusive"), (0.34, "inconclusive"), (0.36, "contradicted")],
)
def test_row_2_is_a_quarter_of_ars_share(share, verdict):
    found = learning.mdm_does_not_converge(around(share, 0.1), ONES, **ENOUGH)
    assert found.verdict == verdict
    assert found.estimate == pytest.approx(share - 0.25)


def test_row_2_counts_ars_spread_and_needs_an_ar_that_rises():
    rule = learning.mdm_does_not_converge
    assert rule(0.14 * ONES, around(1, 0.43), **ENOUGH).verdict == "reproduced"
    assert rule(0.14 * ONES, around(1, 0.45), **ENOUGH).verdict == "inconclusive"
    fallen = rule(around(-5, 1), around(-0.1, 0.01), **ENOUGH)
    assert (fallen.verdict, fallen.p) == ("inconclusive", 1)
    assert "AR did not rise" in fallen.measured


@pytest.mark.parametrize(
    ("restored", "lacked", "verdict"),
    [
        (around(0.41, 0.1), 0.6, "reproduced"),
        (around(0.39, 0.1), 0.6, "inconclusive"),
        (around(0.21, 0.1), 0.6, "inconclusive"),
        (around(0.19, 0.1), 0.6, "contradicted"),
        (around(0.41, 0.1), -0.6, "inconclusive"),
    ],
)
def test_row_4_is_half_of_what_is_lacking(restored, lacked, verdict):
    share = 0.1 * ONES
    found = learning.kl_is_the_cause(share, share + restored, share + lacked, **ENOUGH)
    assert found.verdict == verdict
    assert ("nothing was lacking" in found.measured) == (lacked < 0)


@pytest.mark.parametrize(
    ("mdm", "ar", "verdict"),
    [
        (math.log(2) + around(1.01, 1), -around(1.01, 1), "reproduced"),
        (math.log(2) + around(0.99, 1), -around(1.01, 1), "inconclusive"),
        (math.log(2) + around(1.01, 1), -around(0.99, 1), "inconclusive"),
        (math.log(2) - around(1.01, 1), -around(1.01, 1), "contradicted"),
        (math.log(2) + around(1.01, 1), around(1.01, 1), "contradicted"),
    ],
)
def test_row_5_is_above_2_and_below_1(mdm, ar, verdict):
    found = learning.kl_dominates(np.exp(mdm), np.exp(ar))
    assert found.verdict == verdict
    assert found.estimate == pytest.approx(math.exp(mdm.mean()))


@pytest.mark.parametrize(
    ("kl", "share", "verdict"),
    [
        (-around(1.01, 1), around(0, 0.049), "reproduced"),
        (-around(0.99, 1), around(0, 0.049), "inconclusive"),
        (-around(1.01, 1), around(0, 0.051), "inconclusive"),
        (around(1.01, 1), around(0, 0.049), "contradicted"),
        (-around(1.01, 1), around(-0.1, 0.049), "contradicted"),
    ],
)
def test_row_13_is_a_lower_kl_and_as_good_a_share(kl, share, verdict):
    assert learning.block_rl_cures_kl(kl, share, **ENOUGH).verdict == verdict


def test_row_15_has_the_exact_chance_of_its_orders():
    steps, log_std = (
        [4, 16, 64],
        np.array([[3, 2, 1], [3, 1, 2], [2, 3, 1], [3, 2, 1], [3, 2, 1.0]]),
    )
    found = learning.stability_needs_steps(steps, log_std)
    rhos = [stats.spearmanr(steps, row).statistic for row in log_std]
    assert found.estimate == pytest.approx(np.mean(rhos))
    each = [stats.spearmanr(steps, order).statistic for order in permutations(steps)]
    sums = np.array([sum(one) for one in product(each, repeat=5)])
    exact = 2 * np.mean(sums <= sum(rhos) + 1e-9)
    assert found.p == pytest.approx(max(exact, stats.ttest_1samp(rhos, 0).pvalue))
    agreed = learning.stability_needs_steps(steps, np.tile([3, 2, 1.0], (5, 1)))
    assert agreed.p == pytest.approx(2 / 6**5)  # a t-test would say 0
    assert agreed.verdict == "reproduced"
    assert learning.stability_needs_steps(steps, -log_std).verdict == "contradicted"
    assert "needs 5 seeds" in learning.stability_needs_steps(steps, log_std[:3]).measured
    with pytest.raises(ValueError, match="rising step counts"):
        learning.stability_needs_steps([64, 16, 4], log_std)


def test_row_17_counts_collapses_by_fishers_test():
    def rule(gain, sft, none, **more):
        flags = [[run < count for run in range(len(gain))] for count in (sft, none)]
        return learning.cold_start_helps(gain, 0 * gain, collapsed=flags, **ENOUGH, **more)

    clear = around(0.2, 0.1)
    assert rule(clear, 0, 0).verdict == "reproduced"
    assert rule(clear, 1, 0).verdict == "reproduced"  # one run decides nothing
    assert rule(clear, 3, 0).verdict == "reproduced"
    assert rule(clear, 4, 0).verdict == "inconclusive"  # p = 0.024
    assert rule(around(0.09, 0.1), 0, 5).verdict == "inconclusive"
    assert rule(-clear, 0, 0).verdict == "contradicted"
    # Two runs a checkpoint are ten runs: four collapses of ten have p = 0.043, five 0.016.
    clustered = {"checkpoints": [*range(5)] * 2}
    four, five = (rule(np.tile(clear, 2), n, 0, **clustered) for n in (4, 5))
    assert "4 of 10 and 0 of 10 runs collapsed (p = 0.043" in four.measured
    assert "5 of 10 and 0 of 10 runs collapsed (p = 0.016" in five.measured


@pytest.mark.parametrize(("first", "second"), [(4, 0), (3, 1), (0, 4), (5, 5), (2, 2)])
def test_fishers_p_is_the_share_of_tables_as_extreme(first, second):
    whole = first + second
    ways = {a: math.comb(5, a) * math.comb(5, whole - a) for a in range(whole + 1)}
    expected = sum(ways[a] for a in ways if a >= first) / math.comb(10, whole)
    assert learning.more_often((first, second), (5, 5)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("component", "metric", "verdict"),
    [
        (around(1.01, 1), -around(1.01, 1), "reproduced"),
        (around(0.99, 1), -around(1.01, 1), "inconclusive"),
        (around(1.01, 1), -around(0.99, 1), "inconclusive"),
        (around(1.01, 1), around(1.01, 1), "contradicted"),
        (-around(1.01, 1), -around(1.01, 1), "contradicted"),
    ],
)
def test_row_18_is_a_rise_and_a_fall(component, metric, verdict):
    assert learning.reward_is_hacked(component, metric, **ENOUGH).verdict == verdict


def test_row_20_is_a_rise_at_1_and_a_fall_at_128():
    def rule(first, last, samples=256, base=(0.05, 0.5)):
        return learning.rl_narrows(first, last, samples=samples, base=base)

    up, down = around(1.01, 1), -around(1.01, 1)
    assert rule(up, down).verdict == "reproduced"
    assert rule(around(0.99, 1), down).verdict == "inconclusive"
    assert rule(up, -around(0.99, 1)).verdict == "inconclusive"
    assert rule(up, up).verdict == "contradicted"
    assert "needs 256" in rule(up, down, samples=255).measured
    for base in ((0.04, 0.5), (0.05, 0.51)):
        assert rule(up, down, base=base).verdict == "inconclusive"


# -- Rows of policies as they are ---------------------------------------------------------------


@pytest.mark.parametrize(("number", "n"), [(7, 400), (8, 400)])
@pytest.mark.parametrize(
    ("mean", "verdict"), [(0.1, "reproduced"), (0.01, "inconclusive"), (-0.1, "contradicted")]
)
def test_rows_7_and_8_are_paired_by_item(number, n, mean, verdict):
    difference = items(mean, n)
    better, worse = (difference > 0) * 1.0, (difference < 0) * 1.0
    columns = (worse, better) if number == 7 else (better, worse)
    found = row_of(number).rule(*columns)
    assert found.verdict == verdict
    expected = stats.ttest_1samp(difference, 0)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.seeds, found.conditional) == (0, True)
    few = row_of(number).rule(*(column[:199] for column in columns))
    assert (few.verdict, few.p) == ("inconclusive", 1)


def test_row_7_has_mcnemars_p_where_it_is_larger():
    before, after = np.zeros(200), np.zeros(200)
    after[:8], before[8:9] = 1, 1
    found = inference.rl_helps(before, after)
    mcnemar = stats.binomtest(8, 9).pvalue
    assert mcnemar > stats.ttest_1samp(after - before, 0).pvalue
    assert found.p == pytest.approx(mcnemar)
    assert inference.rl_helps(after, before).p == 1


def test_row_7_of_several_checkpoints_is_a_t_test_over_them():
    checkpoints, draw = np.repeat(range(6), 50), np.random.default_rng(1)
    before = (draw.random(300) < 0.3) * 1.0
    after = (draw.random(300) < 0.6) * 1.0
    found = inference.rl_helps(before, after, checkpoints=checkpoints)
    means = (after - before).reshape(6, 50).mean(1)
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert (found.seeds, found.conditional) == (6, False)


@pytest.mark.parametrize(
    ("countdown", "medcot", "verdict"),
    [(0.1, -0.1, "reproduced"), (0.02, 0.0, "inconclusive"), (-0.2, 0.1, "contradicted")],
)
def test_row_9_is_a_difference_of_differences(countdown, medcot, verdict):
    one, other = items(countdown, 500), items(medcot, 300)
    found = inference.planning_favours_diffusion(one, 0 * one, other, 0 * other)
    assert found.verdict == verdict
    error = math.hypot(stats.sem(one), stats.sem(other))
    test = stats.ttest_ind(one, other, equal_var=False)
    assert found.estimate == pytest.approx(one.mean() - other.mean())
    half = stats.t.ppf(0.975, test.df) * error
    assert (found.low, found.high) == pytest.approx((found.estimate - half, found.estimate + half))


def test_rows_9_and_11_at_plateau_need_one():
    one, other = items(0.1, 500), items(-0.1, 300)
    asked = (one, 0 * one, other, 0 * other)
    assert inference.planning_favours_diffusion(*asked, plateau=True).verdict == "reproduced"
    for found in (
        inference.planning_favours_diffusion(*asked, plateau=False),
        inference.less_accurate(np.ones(200), np.zeros(200), plateau=False),
    ):
        assert (found.verdict, found.p) == ("inconclusive", 1)
        assert "not shown to be at plateau" in found.measured


STEPS = [1, 2, 4, 8]


def ratios(*means, half=0.1):
    """Five timings of the log speed ratio at each of `STEPS`."""
    return np.stack([around(mean, half) for mean in means], 1)


def test_row_10_is_one_change_from_faster_to_slower():
    found = inference.faster_at_few_steps(STEPS, ratios(2, 1, -1, -2))
    assert found.verdict == "reproduced"
    # Where the line from (log 2, m) to (log 4, m - 2) crosses 0, in every timing.
    crossings = np.log(2) + around(1, 0.1) / 2 * np.log(2)
    mean = crossings.mean()
    half = stats.sem(crossings) * stats.t.ppf(0.975, 4)
    expected = np.exp([mean, mean - half, mean + half])
    assert (found.estimate, found.low, found.high) == pytest.approx(tuple(expected))
    assert found.measured.startswith("equally fast at 2.83 [")
    assert found.measured.endswith("steps (5 timings)")
    assert found.p is None


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ((2, 1, -0.05, -2), "reproduced"),  # the sign at 4 is unclear
        ((2, 1, 0.05, 0.05), "inconclusive"),
        ((2, 1, 1, 1), "contradicted"),  # never slower
        ((-1, -1, -1, -1), "contradicted"),  # never faster
        ((-2, -1, 1, 2), "contradicted"),  # the other way round
        ((1, -1, 1, -1), "contradicted"),  # more than once
        ((1, -1, 1, 0.05), "inconclusive"),
    ],
)
def test_row_10_verdicts(means, verdict):
    assert inference.faster_at_few_steps(STEPS, ratios(*means)).verdict == verdict
    assert inference.faster_at_few_steps(STEPS, ratios(*means)[:4]).verdict == "inconclusive"


def test_row_10_without_a_crossing_has_no_place():
    found = inference.faster_at_few_steps(STEPS, ratios(-1, -1, -1, -2))
    assert found.estimate is None
    assert found.measured == (
        "no crossing: the log speed ratio runs from -1 [-1.1, -0.9] at 1 to -2 [-2.1, -1.9] at 8 "
        "steps (5 timings)"
    )
    with pytest.raises(ValueError, match=r"shape \(5, 3\): expected \(5, 4\)"):
        inference.faster_at_few_steps(STEPS, ratios(1, 1, 1))


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [(0, "contradicted"), (1, "contradicted"), (6, "inconclusive"), (12, "reproduced")],
)
def test_row_11_is_two_points_over_paired_prompts(wrong, verdict):
    ar = np.ones(200)
    mdm = ar.copy()
    mdm[:wrong] = 0
    found = inference.less_accurate(ar, mdm, plateau=True)
    assert found.verdict == verdict
    half = stats.sem(ar - mdm) * stats.t.ppf(0.975, 199) if wrong else 0
    assert found.high == pytest.approx(wrong / 200 + half)
    assert found.measured.endswith("(200 items)")


@pytest.mark.parametrize(
    ("rate_16", "rate_ar", "verdict"),
    [
        (around(0.41, 0.1), 0.1 * ONES, "reproduced"),
        (around(0.39, 0.1), 0.1 * ONES, "inconclusive"),
        (around(0.19, 0.1), 0.05 * ONES, "contradicted"),
        (around(0.41, 0.1), 0.4 * ONES, "inconclusive"),
        (around(0.41, 0.1), 0.52 * ONES, "contradicted"),
    ],
)
def test_row_12_is_a_fifth_more_failures(rate_16, rate_ar, verdict):
    found = inference.few_steps_fail(rate_16, 0.1 * ONES, rate_ar, 0.9 * ONES, 0.6 * ONES)
    assert found.verdict == verdict
    assert "90% and 60% of the canvas are used" in found.measured


@pytest.mark.parametrize(
    ("value", "logprob", "verdict"),
    [
        (0.75, 0.6, "reproduced"),
        (0.69, 0.5, "inconclusive"),
        (0.75, 0.7, "inconclusive"),
        (0.49, 0.3, "contradicted"),
        (0.75, 0.9, "contradicted"),
    ],
)
def test_row_14_is_an_area_and_more_than_that_of_log_probability(value, logprob, verdict):
    found = inference.value_judges(around(value, 0.1), logprob * ONES)
    assert found.verdict == verdict
    assert (found.low, found.high) == pytest.approx((value - 0.1, value + 0.1))


@pytest.mark.parametrize(
    ("ratio", "share", "verdict"),
    [
        (around(0.39, 0.1), around(0, 0.04), "reproduced"),
        (0.5 * ONES, around(0, 0.04), "reproduced"),  # half itself counts
        (around(0.45, 0.1), around(0, 0.04), "inconclusive"),
        (around(0.61, 0.1), around(0, 0.04), "contradicted"),
        (around(0.39, 0.1), around(0, 0.06), "inconclusive"),
        (around(0.39, 0.1), around(-0.1, 0.04), "contradicted"),
    ],
)
def test_row_19_is_half_of_the_passes(ratio, share, verdict):
    found = inference.hierarchy_is_faster(ratio, share, 3 * ONES)
    assert found.verdict == verdict
    assert "3 [3, 3] of its seconds" in found.measured


def test_row_21_is_what_the_verifier_says():
    assert inference.dafny_case([True, True], True).verdict == "reproduced"
    assert inference.dafny_case([True, False], True).verdict == "contradicted"
    found = inference.dafny_case([True], False)
    assert (found.verdict, found.p, found.conditional) == ("contradicted", None, False)
    assert found.measured == "1 of 1 wrong programs rejected, the right one not verified"
