"""Table 4-1 at the scale of the tiny models, for notebook 06: which items of four tasks each policy
has right, what tuning on one task alone does to the others, and what others have published.

Scores are pieces (`mdmrl.study.pieces`), one of a policy and a task, with a line an item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import pandas as pd

from mdmrl.config import unknown
from mdmrl.evaluation.examples import evaluate_examples, evaluation_identity
from mdmrl.evaluation.stats import mcnemar, paired_interval, wilson_interval
from mdmrl.identity import known
from mdmrl.policies import Policy, load_policy
from mdmrl.rl import grpo
from mdmrl.rl.config import GRPOConfig
from mdmrl.sampling import SamplerConfig
from mdmrl.study.outputs import runs_folder
from mdmrl.study.pieces import cached_table
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task

ROWS = {"Countdown": "countdown", "GSM": "gsm", "MATH": "math", "choice": "choice"}
ROOM = 8  # tokens that a policy with other words and line breaks gets beside a task's own

# How the tuned policies of the table were made, each on the mixture of all four tasks.
TUNING = GRPOConfig(
    max_steps=60,
    per_device_train_batch_size=32,
    num_generations=8,
    max_completion_length=48,
    beta=0.0,
    learning_rate=1e-4,
)
TUNING_STEPS = 12  # denoising steps of its rollouts

# Published shares of right answers, in percent: of the thesis's Table 4-1, of the base models by
# their authors, and table 1 of d1 (Zhao et al. 2025): its baseline and its best. `QUESTIONS` of the
# thesis's; of Countdown it does not say how many.
PUBLISHED = "published.tsv"
QUESTIONS = {"GSM": 1000, "MATH": 500, "choice": 448}


def tuning(policy: Policy, **changes) -> GRPOConfig:
    """`TUNING` as it is for the policy's family."""
    own = {"sampler": {"steps": TUNING_STEPS}} if policy.denoises else {}
    return TUNING.replace(**own | changes)


def scores(
    policy: Policy, task: Task, rows: Sequence[dict], profile: str, batch_size: int = 64
) -> pd.DataFrame:
    """Which rows the policy has right, completed greedily, with the task's own length and steps:
    columns `index` and `score`, 1 or 0, and the piece's name, `run`."""
    sampler = SamplerConfig.from_dict(task.sampler_for(policy))
    identity = {"piece": "scores", **_look(policy, task, rows, sampler, batch_size=batch_size)}

    def compute(_) -> tuple[pd.DataFrame, dict]:
        shown = {"batch_size": batch_size, "progress": True}
        examples = evaluate_examples(policy, task, rows, sampler, **shown).examples
        return examples[["index", "score"]], {}

    slug = f"{Path(policy.name).name}-{task.name}"
    return cached_table(profile, slug, identity, compute)


def _look(policy: Policy, task: Task, rows: Sequence[dict], sampler: SamplerConfig, **how) -> dict:
    """What decides the law of an evaluation; the device decides its bits alone."""
    identity = evaluation_identity(policy, task, rows, sampler, **how)
    return {name: value for name, value in identity.items() if name != "device"}


def table_scores(
    policies: dict[str, Policy],
    tasks: dict[str, Task],
    rows: dict[str, Sequence[dict]],
    profile: str,
    batch_size: int = 64,
) -> pd.DataFrame:
    """`scores` of every policy (by the name of its column) on the rows of every task (by that of
    its row in the table): with columns `row` and `column`."""
    found = [
        scores(policy, task, rows[row], profile, batch_size).assign(row=row, column=column)
        for column, policy in policies.items()
        for row, task in tasks.items()
    ]
    return pd.concat(found, ignore_index=True)


def summary(frame: pd.DataFrame, by: Sequence[str] = ("row", "column")) -> pd.DataFrame:
    """The share of right answers of each group, in percent, and its 95 % Wilson interval: columns
    `right`, `low`, `high` and `n`, how many items."""
    found = frame.groupby(list(by), sort=False).score.agg(["sum", "size"]).reset_index()
    shares = [wilson_interval(*counts) for counts in found[["sum", "size"]].to_numpy()]
    percent = pd.DataFrame(shares, columns=["right", "low", "high"]) * 100
    return pd.concat([found[list(by)], percent, found["size"].rename("n")], axis=1)


def contrasts(frame: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Of each pair of columns and every row that both have: `gained`, the items that the first
    alone has right, `lost`, those of the second alone, the difference of their shares with Tango's
    interval in points (`change`, `low`, `high`), and McNemar's exact `p`."""
    found = []
    for row, part in frame.groupby("row", sort=False):
        right = part.pivot(index="index", columns="column", values="score")
        for one, other in pairs:
            if not {one, other} <= {*right}:
                continue
            both = right[[one, other]].dropna()
            gained, lost = (
                int((both[one] > both[other]).sum()),
                int((both[one] < both[other]).sum()),
            )
            change = (100 * x for x in paired_interval(gained, lost, len(both)))
            found.append((row, one, other, gained, lost, *change, mcnemar(gained, lost)))
    names = ["row", "column", "minus", "gained", "lost", "change", "low", "high", "p"]
    return pd.DataFrame(found, columns=names)


def few_shot(task: Task) -> Task:
    """The task for a policy that continues worked examples (`n_shot`): what it writes behind the
    first empty line is the next example, and is not read."""
    sampler = {name: count + ROOM for name, count in task.sampler.items()}
    own = {"name": f"{task.name}-few-shot", "sampler": sampler, "extract": None}
    return replace(task, **own, metric=partial(_of_first_answer, task.metric))


def _of_first_answer(metric: Callable, completion: str, row: dict) -> bool | None:
    return metric(completion.lstrip().partition("\n\n")[0], row)


def tuned_on(
    name: str,
    one: str,
    tasks: dict[str, Task],
    rows: dict[str, Sequence[dict]],
    max_steps: int,
    profile: str,
) -> pd.DataFrame:
    """The scores of a policy on the `rows` of all tasks after GRPO (`TUNING`) on the `rl` items of
    one of them: columns `row`, `index`, `score` and `run`. The tuned weights stay in `runs/`.

    Args:
        name: of the policy; one: which row of the table to tune on.
    """
    if one not in tasks:
        raise unknown("row", one, tasks)
    policy, task = load_policy(name), tasks[one]
    config, learnt = tuning(policy, max_steps=max_steps), task.rows("rl")
    samplers = {row: SamplerConfig.from_dict(t.sampler_for(policy)) for row, t in tasks.items()}
    looks = {row: (tasks[row], rows[row], samplers[row]) for row in tasks}
    identity = {
        "piece": "tuned on one task",
        "settings": known(config.settings_for(policy)),
        "rewards": [known(reward) for reward in task.rewards],
        "rows": known(learnt),
        "algorithm": grpo.ALGORITHM,
        "looks": {row: _look(policy, *look) for row, look in looks.items()},
    }

    def compute(piece: str) -> tuple[pd.DataFrame, dict]:
        folder = runs_folder(profile) / "grpo" / piece
        grpo.train_grpo(policy, task.rewards, learnt, config.replace(output_dir=str(folder)))
        found = {row: evaluate_examples(policy, *look).examples for row, look in looks.items()}
        right = {row: frame.set_index("index").score for row, frame in found.items()}
        return pd.DataFrame(right).reset_index(), {}

    slug = f"{Path(name).name}-tuned-on-{task.name}-s{config.seed}"
    since = {"settings": known(type(config)().settings_for(policy))}
    table = cached_table(profile, slug, identity, compute, since)
    return table.melt(["index", "run"], var_name="row", value_name="score").dropna()


def planning_tasks() -> dict[str, Task]:
    """Countdown, and MedCoT in as many steps as tokens, as Countdown is."""
    medcot = replace(load_task("medcot"), sampler={"max_new_tokens": 128, "steps": 128})
    return {"Countdown": load_task("countdown"), "MedCoT": medcot}


def published() -> pd.DataFrame:
    """Published shares of right answers, in percent, of every row, by `source` and `policy`."""
    text = resources.files(__package__) / PUBLISHED
    with text.open() as file:
        return pd.read_csv(file, sep="\t").set_index(["source", "policy"])


def z_of_difference(first: float, second: float, n: int) -> float:
    """z of the difference of two shares, in percent, each of its own n answers."""
    p, q = first / 100, second / 100
    return (p - q) / math.sqrt((p * (1 - p) + q * (1 - q)) / n)
