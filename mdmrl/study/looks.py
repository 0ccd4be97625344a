"""What held-out items say of a policy before and after training, item by item: verdicts on learning
are paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mdmrl.config import Config
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.evaluation.examples import evaluate_examples
from mdmrl.policies import Policy
from mdmrl.rl.config import GRPOConfig
from mdmrl.sampling import SamplerConfig
from mdmrl.study.parallel import agreement, right_solutions
from mdmrl.study.pieces import facts
from mdmrl.tasks.base import Task

BATCH = 250  # completions of one call of the sampler


@dataclass
class Looks(Config):
    """What to look at.

    Attributes:
        split, items: the first so many rows of a split of the task, at both ends of training.
        samples: completions of each at the temperature of training, beside the greedy one.
        steps: of a policy that denoises, numbers of steps in which the same items are completed
            greedily, by one sampler for all arms: the task's own at that many.
        solutions: on so many items of Countdown, `mdmrl.study.parallel` is measured.
    """

    split: str = "test"
    items: int = 500
    samples: int = 4
    steps: list[int] = field(default_factory=list)
    solutions: int = 0


def look(
    policy: Policy, task: Task, rows: Sequence[dict], looks: Looks, config: GRPOConfig
) -> dict[str, Sequence[float]]:
    """One number an item of `rows`, by name: `greedy/reward` and `greedy/accuracy` of the run's own
    sampler, `sampled/...`, the mean of several completions, `steps4/accuracy` and so on; and, where
    asked for, the columns of `right_solutions` and what `agreement` gives, in shorter lists."""
    own = config.sampler_for(policy)

    def values(prefix: str, sampler: SamplerConfig, samples: int, names: Sequence[str]) -> dict:
        how = {"samples": samples, "batch_size": BATCH, "seeds": [config.seed]}
        shown = evaluate_examples(policy, task, rows, sampler, rewards=task.rewards, **how).examples
        means = shown.rename(columns={"score": "accuracy"}).groupby("index")[list(names)].mean()
        return {f"{prefix}/{name}": means[name].tolist() for name in names}

    both = ("reward", "accuracy")
    found = values("greedy", config.sampler_for(policy, greedy=True), 1, both)
    found |= values("sampled", own, looks.samples, both)
    for steps in looks.steps if policy.denoises else ():
        common = SamplerConfig.from_dict({**task.sampler, "steps": steps})
        found |= values(f"steps{steps}", common, 1, ["accuracy"])
    if looks.solutions:
        some = rows[: looks.solutions]
        found |= {name: x.tolist() for name, x in right_solutions(policy, some, own).items()}
        if policy.denoises:
            prompts = [row["prompt"] for row in some]
            found |= {k: [v] for k, v in agreement(policy, prompts, own, config.seed).items()}
    return found


def noted(frame: pd.DataFrame, before: Mapping, after: Mapping) -> dict[str, dict[str, str]]:
    """Put the means of what `look` gave before and after training into the first and last row of a
    run's log, as `look/greedy/reward` and so on; returns the columns themselves, packed."""
    ends = {"before": (frame.index[0], before), "after": (frame.index[-1], after)}
    for row, columns in ends.values():
        for name, values in columns.items():
            frame.loc[row, f"look/{name}"] = np.mean(values)
    return {
        end: {name: " ".join(f"{x:.4g}" for x in values) for name, values in columns.items()}
        for end, (_, columns) in ends.items()
    }


def looked(profile: str, run: str, end: str) -> dict[str, np.ndarray]:
    """The columns of `look` of a run's piece, at its `end`: "before" or "after" training."""
    held = facts(profile, run)["looks"][end]
    return {name: np.array(text.split(), float) for name, text in held.items()}


def sampled(
    policy: Policy, task: Task, rows: Sequence[dict], looks: Looks, config: GRPOConfig
) -> dict[str, float]:
    """`sampled/reward` and `sampled/accuracy`: means over several completions of each row."""
    several = [row for row in rows for _ in range(looks.samples)]
    judged = task.rewards, task.metric, "sampled/", BATCH, config.seed
    found = evaluate(policy, several, config.sampler_for(policy), *judged, watch=task.watch)
    return {name: found[name] for name in ("sampled/reward", "sampled/accuracy")}
