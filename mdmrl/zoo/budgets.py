"""What more or fewer tokens of pre-training make of a tiny model: scores for rows 9 and 11 of the
claims, and bounds on log p, of models that do not ship, each a piece (`mdmrl.study.pieces`) that
its recipe names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from mdmrl.config import unknown
from mdmrl.evaluation.examples import evaluate_examples
from mdmrl.evaluation.likelihood import log_likelihoods
from mdmrl.identity import known
from mdmrl.policies import Policy, load_policy
from mdmrl.policies.load import ZOO
from mdmrl.sampling import SamplerConfig
from mdmrl.study import benchmark
from mdmrl.study.outputs import runs_folder
from mdmrl.study.pieces import cached_table
from mdmrl.study.quantities import at_plateau
from mdmrl.tasks import countdown, load_task
from mdmrl.tasks.base import Task
from mdmrl.training.supervised import encode_pairs
from mdmrl.zoo.pretrain import pretrain_by_name
from mdmrl.zoo.recipes import RECIPES

LONGER = 4 / 3
BATCH = 64


def scores(
    name: str, task: Task, rows: Sequence[dict], profile: str, tokens: float | None = None
) -> pd.DataFrame:
    """`benchmark.scores` of a policy by name. One that does not ship but has a recipe, or is asked
    for with another budget of document tokens, is pre-trained first; its weights stay in `runs/`.
    """
    if tokens is None and (name in ZOO or name not in RECIPES):
        return benchmark.scores(load_policy(name), task, rows, profile, BATCH)
    identity, loaded = _policy(name, tokens, profile)
    identity |= {
        "piece": "scores of a pre-trained model",
        "metric": known(task.metric),
        "sampler": task.sampler,
        "rows": known(rows),
    }

    def compute(piece: str) -> tuple[pd.DataFrame, dict]:
        policy = loaded()
        sampler = SamplerConfig.from_dict(task.sampler_for(policy))
        looked = evaluate_examples(policy, task, rows, sampler, batch_size=BATCH, progress=True)
        return looked.examples[["index", "score"]], {}

    slug = f"{name}-{identity['recipe']['tokens']:.0f}-{task.name}"
    return cached_table(profile, slug, identity, compute)


def bounds(
    names: Sequence[str], rows: Sequence[dict], profile: str, canvas: int = 128, sets: int = 32
) -> pd.DataFrame:
    """How improbable policies find the completions of rows: columns `policy`, `index`, `run`, and
    `nats` a token, by the exact likelihood or the ELBO of `log_likelihoods`.

    Args:
        canvas: tokens that a denoiser writes; it is asked for the end tokens behind a completion
            too, as in its pre-training, which are not counted as tokens, except the first.
        sets: masked sets that each text is scored with.
    """

    def of(name: str) -> pd.DataFrame:
        identity, loaded = _policy(name, None, profile)
        asked = {"canvas": canvas, "sets": sets, "rows": known(rows)}
        identity |= {"piece": "bounds of a pre-trained model", **asked}

        def compute(piece: str) -> tuple[pd.DataFrame, dict]:
            policy = loaded()
            pairs = encode_pairs(policy, rows, canvas)
            end = [policy.tokenizer.eos_token_id] * (canvas if policy.denoises else 0)
            filled = [(before, (text + end)[:canvas]) for before, text in pairs]
            found = log_likelihoods(policy, filled, sets, batch_size=BATCH, progress=True)
            nats = [-logp / len(text) for (logp, _), (_, text) in zip(found, pairs, strict=True)]
            return pd.DataFrame({"index": range(len(rows)), "nats": nats}), {}

        return cached_table(profile, f"{Path(name).name}-bounds", identity, compute).assign(
            policy=name
        )

    return pd.concat([of(name) for name in names], ignore_index=True)


def _policy(name: str, tokens: float | None, profile: str) -> tuple[dict, Callable[[], Policy]]:
    """What identifies a policy, and how to have it: one that is asked for with another budget, or
    does not ship, by its recipe, by which it is pre-trained."""
    if tokens is None and (name in ZOO or name not in RECIPES):
        policy = load_policy(name)
        return {"policy": policy.fingerprint()}, lambda: policy
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    recipe = RECIPES[name] if tokens is None else RECIPES[name].replace(tokens=tokens)
    folder = runs_folder(profile) / "pretrain" / f"{name}-{recipe.tokens:.0f}"
    identity = {"recipe": recipe.to_dict()}
    return identity, lambda: load_policy(pretrain_by_name(name, folder, recipe.tokens))


def longer(names: Sequence[str], items: int, profile: str) -> pd.DataFrame:
    """Whether tiny models of Countdown are at their plateau (`quantities.at_plateau`): each beside
    one that saw 4/3 of its document tokens, decay included, on the same items, which neither saw;
    one that is named again: that longer one beside one of 4/3 of its own, and so on.

    Columns `policy`, `tokens`, the right answers `right` and `right_longer` in percent, `change`
    with Tango's interval `low`, `high` in points, `n` and `at_plateau`.
    """
    task, rows, found = load_task("countdown"), countdown.generator().unseen(items), []
    reached: dict[str, tuple[float, pd.DataFrame]] = {}
    for name in names:
        if name not in reached:
            reached[name] = RECIPES[name].tokens, scores(name, task, rows, profile)
        tokens, own = reached[name]
        grown = float(round(LONGER * tokens))
        more = scores(name, task, rows, profile, grown)
        both = pd.concat([own.assign(row=name, column="own"), more.assign(row=name, column="more")])
        (line,) = benchmark.contrasts(both, [("more", "own")]).itertuples()
        right = own.score.sum(), more.score.sum()
        shares = [100 * count / len(rows) for count in right]
        change = line.change, line.low, line.high
        found.append((name, tokens, *shares, *change, len(rows), at_plateau(*right, len(rows))))
        reached[name] = grown, more
    names = ["policy", "tokens", "right", "right_longer", "change", "low", "high", "n"]
    return pd.DataFrame(found, columns=[*names, "at_plateau"])


def tokens(names: Sequence[str]) -> pd.DataFrame:
    """Document tokens in millions that tiny models are pre-trained on, by their recipes; a policy
    without one has none. Columns `policy`, `task`, `million tokens`."""
    found = [
        (name, RECIPES[name].task, RECIPES[name].tokens / 1e6)
        if name in RECIPES
        else (name, None, math.nan)
        for name in names
    ]
    return pd.DataFrame(found, columns=["policy", "task", "million tokens"])
