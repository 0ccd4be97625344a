"""Rules on what is done at inference (notebooks 09 and 10)."""

from __future__ import annotations

from mdmrl.study.verdicts.rules import (
    Finding,
    Seeds,
    Verdict,
    above,
    columns_of,
    interval_of,
    judged,
    rule,
)


@rule
def value_judges(auroc_value, auroc_logprob) -> Finding:
    """A value function judges half-denoised text: its area under the ROC curve within prompts, of
    states at half the steps, is above 0.6, and above that of the mean log-probability of what is
    revealed."""
    area, more = interval_of(auroc_value), interval_of(auroc_value - auroc_logprob)
    measured = f"V's area is {area}, {more} above that of the mean log-probability"
    return above(measured, (area, 0.6), (more, 0))


def value_guides(guided: Seeds, best_of_n: Seeds, by_prompt: Seeds, texts: float) -> Verdict:
    """Value-guided sampling beats choosing among finished texts by the same V, at equal cost.

    Args:
        guided, best_of_n: mean rewards over the same prompts, of each seed's own V; n such that
            both cost the same.
        by_prompt: guided minus best of n, the mean over seeds of every prompt.
        texts: how many plain completions either costs, to be told.

    Reproduced iff the lower ends of the mean difference over seeds and over prompts are above 0;
    contradicted iff both upper ends are below 0. The interval given is that over seeds.
    """
    guided, best_of_n = columns_of(guided=guided, best_of_n=best_of_n)
    (by_prompt,) = columns_of(by_prompt=by_prompt)
    seeds, prompts = interval_of(guided - best_of_n), interval_of(by_prompt)
    found = Finding(
        seeds,
        reproduced=min(seeds.low, prompts.low) > 0,
        contradicted=max(seeds.high, prompts.high) < 0,
        measured=f"the reward less that of best of n is {seeds}, over prompts "
        f"{prompts}, each for the cost of {texts:.3g} plain completions",
    )
    return judged(found, len(guided))


@rule
def few_steps_pay(tuned_few, base, tuned_many) -> Finding:
    """RL at few denoising steps still pays when the steps are raised at inference.

    Of mean rewards, or shares of exact answers, with many steps, that of the model tuned with few
    less that of the base is above 0; how it compares with the model tuned with many is said beside.
    """
    gained, ahead = interval_of(tuned_few - base), interval_of(tuned_few - tuned_many)
    measured = (
        f"with many steps, RL with few has gained {gained}, and is {ahead} ahead of RL with many"
    )
    return above(measured, (gained, 0))


@rule
def hierarchy_is_faster(nfe_ratio, reward_difference, headroom_flat) -> Finding:
    """The hierarchy needs fewer sequential forward passes than flat text, and is not worse.

    `nfe_ratio` counts forward passes on the critical path, hierarchy / flat; `reward_difference` is
    hierarchy minus flat, of the part of the reward that the hierarchy is not given, and the
    headroom the ceiling of that part minus flat. Reproduced iff the upper end of the ratio is at
    most 1/2 and the lower end of the difference over the headroom above -0.05; contradicted iff the
    ratio's lower end is above 1/2 or the difference's upper end below -0.05. The interval given is
    the ratio's.
    """
    passes, worse = interval_of(nfe_ratio), interval_of(reward_difference / headroom_flat)
    return Finding(
        passes,
        reproduced=passes.high <= 0.5 and worse.low > -0.05,
        contradicted=passes.low > 0.5 or worse.high < -0.05,
        measured=f"its critical path has {passes} of flat's forward passes; what it is not "
        f"given of the reward is {worse} of the headroom higher",
    )
