"""The verdict rules at and around their boundaries."""

import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from scipy import stats

from mdmrl.study.quantities import (
    collapsed,
    gain,
    headroom,
    kl_at,
    kl_ratio,
    law,
    updates_to,
)
from mdmrl.study.verdicts import (
    Verdict,
    appc_failures,
    block_rl_cures_kl,
    cold_start_helps,
    diffusion_samples_faster,
    few_steps_pay,
    fig41_ar_rises,
    fig41_mdm_does_not_converge,
    fig42_kl_is_the_cause,
    fig43_longer_is_steadier,
    fig44_crossing,
    fig44_less_accurate,
    hierarchy_is_faster,
    kl_is_cured,
    kl_law_predicts,
    stability_needs_steps,
    value_guides,
    value_judges,
)

# Five seeds around 0 whose mean has a 95 % t-interval of exactly -1 to 1.
UNIT = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
UNIT /= stats.sem(UNIT) * stats.t.ppf(0.975, 4)
ONES = np.ones(5)


def around(mean, half):
    return mean + half * UNIT


# -- Quantities ---------------------------------------------------------------------------------


def test_gain_and_headroom():
    assert gain([1, 2]) == 1
    assert gain([0, 5, 5, 5, 1]) == 1  # at least one step each
    curve = [0, 1] + [9] * 16 + [2, 4]
    assert gain(curve) == 2.5
    assert headroom(curve, 2.8) == pytest.approx(2.3)
    with pytest.raises(ValueError, match=r"starts at 0\.5, not below its ceiling 0\.5"):
        headroom(curve, 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        gain([1])


def test_updates_to():
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
    assert kl_ratio([1, 8, 3, 9], [1, 2, 1, 0]) == 3
    assert np.isnan(kl_ratio([1, 2], [0, 0]))


def test_the_law_is_that_of_the_first_updates():
    assert law([0, 1, 2, 3, 4, 50, 60]) == 2
    assert law([3.0]) == 3


# -- Rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampled", "greedy", "verdict"),
    [
        (around(1.01, 1), around(1.01, 1), "reproduced"),
        (around(1.01, 1), around(0.99, 1), "inconclusive"),
        (around(0.99, 1), around(1.01, 1), "inconclusive"),
        (around(-0.99, 1), around(2, 1), "inconclusive"),
        (around(-1.01, 1), around(2, 1), "contradicted"),
        (around(2, 1), around(-1.01, 1), "contradicted"),
    ],
)
def test_fig41_ar_rises(sampled, greedy, verdict):
    result = fig41_ar_rises(sampled, greedy)
    assert result.verdict == verdict
    assert (result.estimate, result.low, result.high) == pytest.approx(
        (sampled.mean(), sampled.mean() - 1, sampled.mean() + 1)
    )


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.14, "reproduced"), (0.16, "inconclusive"), (0.34, "inconclusive"), (0.36, "contradicted")],
)
def test_fig41_mdm_does_not_converge(share, verdict):
    result = fig41_mdm_does_not_converge(2 * around(share, 0.1), 2 * ONES, around(4, 9), 4.0 * ONES)
    assert result.verdict == verdict
    assert result.estimate == pytest.approx(share)
    assert "a quarter of AR's mean 0.25" in result.measured


def test_fig41_needs_an_ar_that_rises():
    result = fig41_mdm_does_not_converge(around(-5, 1), ONES, around(-0.1, 1), ONES)
    assert result.verdict == "inconclusive"
    assert "AR did not rise" in result.measured


def fig42(restored, lost=1.0, mdm=3 * ONES, ar=0.5 * ONES):
    """AR gains its whole headroom, the MDM lacks `lost` of it, beta 0 gives back `restored`."""
    gained = 2 - lost * ONES
    return fig42_kl_is_the_cause(gained, gained + restored, 2 * ONES, 3 * ONES, 3 * ONES, mdm, ar)


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (dict(restored=around(0.61, 0.1)), "reproduced"),
        (dict(restored=0.5 * ONES), "reproduced"),
        (dict(restored=around(0.59, 0.1)), "inconclusive"),
        (dict(restored=around(0.41, 0.1)), "inconclusive"),
        (dict(restored=around(0.39, 0.1)), "contradicted"),
        (dict(restored=around(0.9, 0.1), mdm=2 * ONES), "inconclusive"),
        (dict(restored=around(0.9, 0.1), mdm=1.99 * ONES), "contradicted"),
        (dict(restored=around(0.9, 0.1), mdm=2 * np.exp(around(0.99, 1))), "inconclusive"),
        (dict(restored=around(0.9, 0.1), mdm=2 * np.exp(around(1.01, 1))), "reproduced"),
        (dict(restored=around(0.9, 0.1), ar=ONES), "inconclusive"),
        (dict(restored=around(0.9, 0.1), ar=1e9 * ONES), "inconclusive"),
        (dict(restored=around(0.9, 0.1), ar=0 * ONES), "reproduced"),
        (dict(restored=around(0.9, 0.1), lost=0.0), "contradicted"),
        (dict(restored=around(-0.9, 0.1), lost=-1.0), "contradicted"),
        (dict(restored=around(0.9, 0.1), lost=around(0.5, 0.6)), "inconclusive"),
        (dict(restored=around(0.9, 0.1), lost=around(-0.5, 0.6)), "inconclusive"),
        (dict(restored=around(0.9, 0.1), lost=around(-0.5, 0.4)), "contradicted"),
        (dict(restored=around(0.9, 0.1), mdm=np.nan * ONES), "inconclusive"),
    ],
)
def test_fig42_kl_is_the_cause(case, verdict):
    assert fig42(**case).verdict == verdict


def test_fig42_says_that_nothing_was_lost():
    assert fig42(around(0.9, 0.1), lost=-1.0).measured.startswith("nothing was lost: ")
    assert "nothing was lost" not in fig42(around(0.9, 0.1)).measured


def test_fig42_share_is_scaled_by_headroom():
    # AR makes 60 % of its way; 60 % of the MDM's headroom of 2 is 1.2; it made 0.2 and 0.7.
    result = fig42_kl_is_the_cause(
        0.2 * ONES, 0.7 * ONES, 2 * ONES, 0.9 * ONES, 1.5 * ONES, 3 * ONES, 0.5 * ONES
    )
    assert result.estimate == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("std", "updates", "verdict"),
    [
        (-1.01, -1.01, "reproduced"),
        (-0.99, -1.01, "inconclusive"),
        (-1.01, -0.99, "inconclusive"),
        (-2, 0.99, "inconclusive"),
        (-2, 1.01, "contradicted"),
        (1.01, -2, "contradicted"),
    ],
)
def test_fig43_longer_is_steadier(std, updates, verdict):
    assert fig43_longer_is_steadier(around(std, 1), around(updates, 1)).verdict == verdict


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
def test_appc_failures(rate_16, rate_ar, verdict):
    assert appc_failures(rate_16, 0.1 * ONES, rate_ar).verdict == verdict


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_fewer_than_five_seeds_decide_nothing(seeds):
    large = np.linspace(10, 11, seeds)
    one = np.ones(seeds)
    results = [
        fig41_ar_rises(large, large),
        fig41_ar_rises(-large, -large),
        fig41_mdm_does_not_converge(-large, one, one, one),
        fig42_kl_is_the_cause(-one, one, one, one, one, large, 0.1 * one),
        fig42_kl_is_the_cause(one, one, one, 0 * one, one, 0 * one, np.nan * one),
        fig43_longer_is_steadier(-large, -large),
        appc_failures(large, one, one),
    ]
    for result in results:
        assert result.verdict == "inconclusive"
        assert f"({seeds} seed{'s' * (seeds > 1)}, needs 5 seeds)" in result.measured
        assert (result.low is None) == (seeds == 1)
        json.dumps(asdict(result), allow_nan=False)


STEPS = [1, 2, 4, 8]


def ratios(*means, half=0.1):
    """Five timings of the log speed ratio at each of `STEPS`."""
    return np.stack([around(mean, half) for mean in means], 1)


def test_fig44_crossing_is_one_change_from_faster_to_slower():
    found = fig44_crossing(STEPS, ratios(2, 1, -1, -2))
    assert found.verdict == "reproduced"
    # Where the line from (log 2, m) to (log 4, m - 2) crosses 0, in every timing.
    crossings = np.log(2) + around(1, 0.1) / 2 * np.log(2)
    mean = crossings.mean()
    half = stats.sem(crossings) * stats.t.ppf(0.975, 4)
    expected = np.exp([mean, mean - half, mean + half])
    assert (found.estimate, found.low, found.high) == pytest.approx(tuple(expected))
    assert found.measured.startswith("equally fast at 2.83 [")
    assert found.measured.endswith("steps (5 timings)")


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
def test_fig44_crossing_verdicts(means, verdict):
    assert fig44_crossing(STEPS, ratios(*means)).verdict == verdict


def test_fig44_crossing_without_one_has_no_place():
    found = fig44_crossing(STEPS, ratios(-1, -1, -1, -2))
    assert found.estimate is None
    assert found.measured == (
        "no crossing: the log speed ratio runs from -1 [-1.1, -0.9] at 1 to -2 [-2.1, -1.9] at 8 "
        "steps (5 timings)"
    )
    with pytest.raises(ValueError, match=r"shape \(5, 3\): expected \(5, 4\)"):
        fig44_crossing(STEPS, ratios(1, 1, 1))


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [(0, "contradicted"), (1, "contradicted"), (6, "inconclusive"), (12, "reproduced")],
)
def test_fig44_less_accurate_is_paired_over_prompts(wrong, verdict):
    ar = np.ones(200)
    mdm = ar.copy()
    mdm[:wrong] = 0
    found = fig44_less_accurate(ar, mdm)
    assert found.verdict == verdict
    half = stats.sem(ar - mdm) * stats.t.ppf(0.975, 199) if wrong else 0
    assert found.high == pytest.approx(wrong / 200 + half)
    assert found.measured.endswith("(200 prompts)")


def test_diffusion_samples_faster_looks_at_the_best_of_many():
    level = stats.t.ppf(1 - 0.025 / 4, 4) / stats.t.ppf(0.975, 4)  # Bonferroni over four
    found = diffusion_samples_faster(STEPS, ratios(1, 0.5, -1, 2, half=0.9 / level))
    assert found.verdict == "reproduced"
    assert (found.estimate, found.low, found.high) == pytest.approx((-1, -1.9, -0.1))
    assert "at its best step count, 4," in found.measured
    assert (
        diffusion_samples_faster(STEPS, ratios(1, 0.5, -1, 2, half=1.1 / level)).verdict
        == "inconclusive"
    )
    assert diffusion_samples_faster(STEPS, ratios(1, 1, 1, 2)).verdict == "contradicted"


def test_diffusion_samples_faster_leaves_out_steps_at_which_nothing_was_right():
    table = ratios(1, 1, -1, 1)
    table[2, 2] = np.inf
    assert diffusion_samples_faster(STEPS, table).verdict == "contradicted"
    nothing = diffusion_samples_faster(STEPS, np.full((5, 4), np.inf))
    assert nothing.verdict == "contradicted"
    assert nothing.estimate is None


def test_the_kl_at_a_reward_is_read_off_the_first_time_it_is_reached():
    assert kl_at(1.5, [1.0, 2.0, 1.2, 3.0], [0.0, 4.0, 5.0, 9.0]) == 2.0
    assert kl_at(3.0, [1.0, 2.0, 1.2, 3.0], [0.0, 4.0, 5.0, 9.0]) == 9.0
    assert np.isnan(kl_at(3.1, [1.0, 3.0], [0.0, 4.0]))
    assert np.isnan(kl_at(1.0, [1.0, 3.0], [0.0, 4.0]))  # nothing was learnt, nothing spent


def test_collapsed():
    assert collapsed([2.0] * 10 + [1.89] * 10)
    assert not collapsed([2.0] * 10 + [1.91] * 10)


def block(ratio, reward=ONES, fell=0 * ONES, fell_whole=0 * ONES):
    return block_rl_cures_kl(ratio, reward, ONES, 2 * ONES, fell, fell_whole)


def test_block_rl_cures_kl():
    found = block(around(-1, 0.9))
    assert found.verdict == "reproduced"
    assert (found.estimate, found.low, found.high) == pytest.approx((-1, -1.9, -0.1))
    one = np.array([0, 1, 0, 0, 0])
    for changes, expected in (
        ({"ratio": around(-1, 1.1)}, "inconclusive"),
        ({"ratio": around(1, 1.1)}, "inconclusive"),
        ({"ratio": around(1, 0.9)}, "contradicted"),
        ({"fell": one}, "contradicted"),
        ({"fell": one, "fell_whole": one}, "reproduced"),
        ({"reward": around(1, 0.09)}, "reproduced"),  # 4.5 % of the headroom of 2
        ({"reward": around(1, 0.11)}, "inconclusive"),
        ({"reward": around(0.7, 0.19)}, "contradicted"),
        ({"reward": around(0.7, 0.21)}, "inconclusive"),
    ):
        assert block(**{"ratio": around(-1, 0.9)} | changes).verdict == expected, changes


@pytest.mark.parametrize("rule", [kl_law_predicts, stability_needs_steps])
def test_correlations_are_negative(rule):
    found = rule(around(-0.5, 0.4))
    assert found.verdict == "reproduced"
    assert (found.estimate, found.low, found.high) == pytest.approx((-0.5, -0.9, -0.1))
    assert rule(around(-0.5, 0.6)).verdict == "inconclusive"
    assert rule(around(0.5, 0.6)).verdict == "inconclusive"
    assert rule(around(0.5, 0.4)).verdict == "contradicted"


def cured(loss=3.0, kl=3.0, norm=3.0, share=1.0, half=0.1):
    """Logarithms of the ratios (log 10 is 2.303), and the MDM's share of AR's G / headroom."""
    spread = (around(x, half) for x in (loss, kl, norm))
    return kl_is_cured(*spread, around(share, half), 2 * ONES, 1.5 * ONES, 3 * ONES)


def test_kl_is_cured():
    found = cured()
    assert found.verdict == "reproduced"
    assert (found.estimate, found.low, found.high) == pytest.approx((1, 0.9, 1.1))
    assert "20.1 [18.2, 22.2] (loss)" in found.measured
    for name in ("loss", "kl", "norm"):
        assert cured(**{name: 2.41}).verdict == "reproduced"
        assert cured(**{name: 2.39}).verdict == "inconclusive"
        assert cured(**{name: 2.21}).verdict == "inconclusive"
        assert cured(**{name: 2.19}).verdict == "contradicted"
    assert cured(share=0.91).verdict == "reproduced"
    assert cured(share=0.89).verdict == "inconclusive"
    assert cured(share=0.69).verdict == "contradicted"


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
def test_value_judges(value, logprob, verdict):
    found = value_judges(around(value, 0.1), logprob * ONES)
    assert found.verdict == verdict
    assert (found.low, found.high) == pytest.approx((value - 0.1, value + 0.1))


def test_cold_start_helps():
    nothing, one = 0 * ONES, np.eye(5)[0]
    found = cold_start_helps(around(0.3, 0.1), 0.1 * ONES, around(0.5, 0.1), nothing, one)
    assert found.verdict == "reproduced"
    assert "G differs by 0.2 [0.1, 0.3]" in found.measured
    assert "final reward by 0.5 [0.4, 0.6]; 0 and 1 runs" in found.measured
    rule = partial(cold_start_helps, gain_none=nothing, final_difference=ONES)
    assert rule(around(0.05, 0.1), collapsed_sft=nothing, collapsed_none=one).verdict == (
        "inconclusive"
    )
    for gained, fell in ((-0.2, nothing), (0.2, one)):
        found = rule(around(gained, 0.1), collapsed_sft=fell, collapsed_none=nothing)
        assert found.verdict == "contradicted"


def test_value_guides_holds_for_other_fits_of_v_and_for_other_prompts():
    best = around(3, 1)

    def judged(more, by_prompt):
        return value_guides(best + more, best, by_prompt, 2.25)

    clear, unclear = around(0.2, 0.1), around(0.05, 0.1)
    assert judged(clear, clear).verdict == "reproduced"
    assert judged(unclear, clear).verdict == "inconclusive"
    assert judged(clear, unclear).verdict == "inconclusive"
    assert judged(-clear, -unclear).verdict == "inconclusive"
    worse = judged(-clear, -clear)
    assert worse.verdict == "contradicted"
    assert "is -0.2 [-0.3, -0.1], over" in worse.measured
    assert "the cost of 2.25 plain completions" in worse.measured
    few = value_guides([3.0], [2.0], np.ones(48), 1.0)
    assert few.verdict == "inconclusive" and "1 seed, needs 5" in few.measured


def test_few_steps_pay():
    found = few_steps_pay(around(2.0, 0.1), 1.8 * ONES, 2.3 * ONES)
    assert found.verdict == "reproduced"
    assert "gained 0.2 [0.1, 0.3], and is -0.3 [-0.4, -0.2] ahead" in found.measured
    assert few_steps_pay(around(1.85, 0.1), 1.8 * ONES, ONES).verdict == "inconclusive"
    assert few_steps_pay(around(1.6, 0.1), 1.8 * ONES, ONES).verdict == "contradicted"


@pytest.mark.parametrize(
    ("ratio", "difference", "verdict"),
    [
        (0.39, 0.0, "reproduced"),
        (0.45, 0.0, "inconclusive"),
        (0.61, 0.0, "contradicted"),
        (0.39, -0.03, "inconclusive"),
        (0.39, -0.3, "contradicted"),
    ],
)
def test_hierarchy_is_faster(ratio, difference, verdict):
    found = hierarchy_is_faster(around(ratio, 0.1), around(difference, 0.01), 0.5 * ONES)
    assert found.verdict == verdict


def test_a_seed_without_a_finite_number_decides_nothing():
    values = around(9, 1)
    values[2] = np.nan
    expected = "G is nan sampled and 9 [8, 10] greedy (5 seeds)"
    result = fig41_ar_rises(values, around(9, 1))
    assert result == Verdict("inconclusive", None, None, None, expected)


def test_columns_must_hold_the_same_seeds():
    with pytest.raises(ValueError, match=r"'sampled': 5, 'greedy': 4"):
        fig41_ar_rises(ONES, ONES[:4])
    with pytest.raises(ValueError, match="expected one a seed"):
        fig41_ar_rises([], [])
    with pytest.raises(ValueError, match=r"headroom_ar=.*expected positive"):
        fig41_mdm_does_not_converge(ONES, ONES, ONES, 0 * ONES)
