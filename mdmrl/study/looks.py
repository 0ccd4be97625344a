"""What held-out items say of a policy before and after training, item by item: verdicts on learning
are paired by prompt."""

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
from mdmrl.study.quantities import held_out_gain, held_out_share, mean_until
from mdmrl.tasks.base import Task

ENDS = ("before", "after")
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
    sampler, `sampled/...`, the mean of several completions, `steps4/...` and so on; and, where
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
        found |= values(f"steps{steps}", common, 1, both)
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
    ends = dict(zip(ENDS, ((frame.index[0], before), (frame.index[-1], after)), strict=True))
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


def gains(runs: pd.DataFrame, profile: str, column: str, ceiling: float = 1.0) -> pd.DataFrame:
    """What training gave the items of each run: a row a run, with index (arm, seed) and columns
    `start`, `gain` and `share` (`mdmrl.study.quantities`) of what `look` calls `column`; a start at
    the ceiling leaves no share, nan."""
    rows = []
    for (arm, seed, run), _ in runs.groupby(["arm", "seed", "run"], sort=False):
        before, after = (looked(profile, run, end)[column] for end in ENDS)
        room = before.mean() < ceiling
        share = held_out_share(before, after, ceiling) if room else np.nan
        rows.append((arm, seed, before.mean(), held_out_gain(before, after), share))
    table = pd.DataFrame(rows, columns=["arm", "seed", "start", "gain", "share"])
    return table.set_index(["arm", "seed"])


def with_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """The logs, with what each run had spent before a row: columns `spent/positions` that were
    computed and `spent/seconds` of its updates, and the same of its rollouts alone,
    `spent/rollout positions` and `spent/rollout seconds`."""
    costs = {
        "positions": runs["token_forwards"] + runs["token_forwards/scoring"],
        "seconds": runs["step_time"],
        "rollout positions": runs["token_forwards"],
        "rollout seconds": runs["rollout_time"],
    }
    table = pd.DataFrame({f"spent/{name}": cost.fillna(0) for name, cost in costs.items()})
    return runs.join(table.groupby([runs.arm, runs.seed]).cumsum() - table)


def areas(runs: pd.DataFrame, arms: Sequence[str], cost: str) -> pd.DataFrame:
    """The mean greedy accuracy that two arms gained on the way to what both have spent of `cost`, a
    column of `with_costs` (`quantities.mean_until`): a column an arm, a row a seed."""
    seen = runs.dropna(subset=["eval/accuracy"]).sort_values("step")
    curves = [dict(iter(seen[seen.arm == arm].groupby("seed"))) for arm in arms]
    rows = {}
    for seed in sorted(curves[0].keys() & curves[1].keys()):
        pair = [curve[seed] for curve in curves]
        end = min(run[cost].iloc[-1] for run in pair)
        accuracies = [run["eval/accuracy"] - run["eval/accuracy"].iloc[0] for run in pair]
        rows[seed] = [mean_until(x[cost], y, end) for x, y in zip(pair, accuracies, strict=True)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(arms), dtype=float)
