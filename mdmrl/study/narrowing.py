"""What RL leaves of the ways to a right answer (Fig. 5-2): how often k completions of a Countdown
item hold a right one, and how many different right ones, before RL and after.

Items are chosen by how often the model as it is gets them right. Those that were lucky when they
were chosen would look worse when they are counted, so that `chosen_items` looks at other
completions than those that `solutions` counts.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mdmrl.config import require
from mdmrl.evaluation.examples import evaluate_examples
from mdmrl.evaluation.stats import pass_at_k
from mdmrl.identity import described, digest
from mdmrl.policies import Policy, load_policy
from mdmrl.rewards.countdown import countdown_solution
from mdmrl.runs import derived_seed
from mdmrl.sampling import SamplerConfig
from mdmrl.study.pieces import cached_table, facts
from mdmrl.study.training import trained_policy
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task

VERSION = "narrowing-1"  # part of a piece's identity: raise it when results change
BETWEEN = 0.05, 0.5  # pass@1 of the items, where RL has something to teach and k matters
AT_ONCE = 256  # completions
WRONG = "wrong"
SINCE = {"sampler": SamplerConfig().to_dict()}  # of settings that an older piece does not name


def chosen_items(
    name: str, sampler: SamplerConfig, count: int, samples: int, profile: str
) -> pd.DataFrame:
    """The first `count` items of the test split that the policy called `name` gets right in a share
    `BETWEEN` of `samples` completions: columns `item`, its place in the split, and `right`, that
    share."""
    policy, task = load_policy(name), load_task("countdown")
    rows = task.rows("test")

    def compute(_: str) -> tuple[pd.DataFrame, dict]:
        found, start, step = [], 0, max(1, AT_ONCE // samples)
        while len(found) < count and start < len(rows):
            seed = derived_seed(0, "choose", start)
            some = rows[start : start + step]
            examples = _examples(policy, task, some, sampler, samples, seed)
            shares = examples.groupby("index").score.mean()
            inside = shares[shares.between(*BETWEEN)]
            found += [(start + place, share) for place, share in inside.items()]
            start += step
        said = f"{len(found)} of {len(rows)} items of {name} have pass@1 in {BETWEEN}"
        require(len(found) >= count, f"{said}: expected {count}; ask for fewer")
        return pd.DataFrame(found[:count], columns=["item", "right"]), {"looked_at": start}

    identity = {"piece": "items", "count": count, "samples": samples, "between": BETWEEN}
    identity |= _asked(policy, task, sampler)
    return cached_table(profile, f"{Path(name).name}-items", identity, compute, SINCE)


def solutions(
    name: str,
    sampler: SamplerConfig,
    items: Sequence[int],
    samples: int,
    profile: str,
    run: str | None = None,
) -> pd.DataFrame:
    """How often each solution (`countdown_solution`) is written in `samples` completions of each of
    the `items`, by the policy as it is or after the `run` of that name, of an arm with looks:
    columns `item`, `solution`, which is "wrong" for all that is, and `count`."""
    policy, task = load_policy(name), load_task("countdown")
    rows = [task.rows("test")[item] for item in items]
    identity = {"piece": "solutions", "items": list(items), "samples": samples}
    identity |= _asked(policy, task, sampler)
    if run is not None:
        identity["policy"] = facts(profile, run)["trained"]

    def compute(_: str) -> tuple[pd.DataFrame, dict]:
        asked = policy if run is None else trained_policy(profile, run)
        examples = _examples(asked, task, rows, sampler, samples, derived_seed(0, "count"))
        counts = Counter()
        for place, text, right in examples[["index", "completion", "score"]].itertuples(False):
            said = countdown_solution(text, rows[place]["nums"]) if right else WRONG
            counts[items[place], said] += 1
        found = [(*key, count) for key, count in counts.items()]
        return pd.DataFrame(found, columns=["item", "solution", "count"]), {"after": run}

    return cached_table(profile, f"{Path(name).name}-solutions", identity, compute, SINCE)


def curves(found: pd.DataFrame, ks: Sequence[int]) -> pd.DataFrame:
    """Of each item of `solutions` and each k: the chance that k completions hold a right one
    (`pass@k`), and how many different right solutions they hold on average (`distinct`), both
    without bias (of species in a sample, Hurlbert 1971)."""
    rows = []
    for item, part in found.groupby("item"):
        n, right = int(part["count"].sum()), part[part.solution != WRONG]["count"]
        for k in ks:
            distinct = sum(pass_at_k(n, int(count), k) for count in right)
            rows.append((item, k, pass_at_k(n, int(right.sum()), k), distinct))
    return pd.DataFrame(rows, columns=["item", "k", "pass@k", "distinct"])


def crossing(base: np.ndarray, tuned: np.ndarray, ks: Sequence[int]) -> float:
    """The k from which on the base model's mean pass@k is the higher one, of (items, ks) each:
    linear in log k where the difference first falls below 0; the first k where it starts there, and
    infinite where it never does."""
    ahead = (tuned - base).mean(0)
    behind = np.flatnonzero(ahead < 0)
    if not len(behind):
        return np.inf
    if not (i := behind[0]):
        return float(ks[0])
    share = ahead[i - 1] / (ahead[i - 1] - ahead[i])
    return float(ks[i - 1] * (ks[i] / ks[i - 1]) ** share)


def _examples(policy, task, rows, sampler: SamplerConfig, samples: int, seed: int) -> pd.DataFrame:
    how = {"seeds": [seed], "samples": samples, "batch_size": AT_ONCE}
    return evaluate_examples(policy, task, rows, sampler, **how).examples


def _asked(policy: Policy, task: Task, sampler: SamplerConfig) -> dict:
    rows = digest(described(task.rows("test")))
    asked = {"policy": policy.fingerprint(), "rows": rows, "sampler": sampler.to_dict()}
    return asked | {"version": VERSION}
