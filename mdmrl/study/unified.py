"""The six methods of `mdmrl.rl.unified` on one model and Countdown (notebook 15), and RL on a
reward model. A run is a piece (`mdmrl.study.pieces`) whose table is its log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mdmrl.config import Config
from mdmrl.identity import described, digest, known
from mdmrl.policies import Policy, load_policy
from mdmrl.rl import grpo, ppo, preference, rejection
from mdmrl.rl.config import EPISODE, GRPOConfig, PPOConfig
from mdmrl.rl.reward_models import RewardModel
from mdmrl.runs import read_rows
from mdmrl.study.outputs import runs_folder
from mdmrl.study.pieces import cached_table
from mdmrl.tasks import Task, load_task
from mdmrl.training import sft
from mdmrl.training.config import SFTConfig, TrainingConfig

PROXY, RULE = "reward_model", "countdown_reward"  # names in the log
STEPWISE = {"beta": 0, "num_iterations": 1, "value_batches": 4}
ON_PROXY = {"beta": 0, "log_kl": True, "reward_weights": [1, 0]}  # right answers are logged alone

RFT, GRPO = rejection.RFTConfig, GRPOConfig
# Of each method: its settings, how it trains, its version, and what all of its runs share.
METHODS: dict[str, tuple[type[TrainingConfig], Callable, str, dict]] = {
    "SFT": (SFTConfig, sft.train_sft, sft.ALGORITHM, {}),
    "RFT": (RFT, rejection.train_rft, rejection.ALGORITHM, {}),
    "Online RFT": (RFT, rejection.train_rft, rejection.ALGORITHM, {"online": True}),
    "DPO": (preference.DPOConfig, preference.train_dpo, preference.ALGORITHM, {}),
    "PPO": (PPOConfig, ppo.train_ppo, ppo.ALGORITHM, STEPWISE),
    "GRPO": (GRPO, grpo.train_grpo, grpo.ALGORITHM, {"beta": 0}),
    "GRPO on a reward model": (GRPO, grpo.train_grpo, grpo.ALGORITHM, ON_PROXY),
}


@dataclass
class Budget(Config):
    """What all methods get: `updates` of so many `completions` (DPO half as many pairs), drawn in
    groups of `num_generations`; offline methods draw all of them first. Every `eval_steps` updates
    `eval_prompts` held-out prompts are completed greedily."""

    updates: int
    completions: int
    num_generations: int
    learning_rate: float
    eval_steps: int
    eval_prompts: int

    def config(self, method: str, policy: Policy, task: Task, **own) -> TrainingConfig:
        """The settings of a method, with one sampler for all, whose path is an episode of PPO."""
        made, _, _, fixed = METHODS[method]
        shared = {"max_steps": self.updates, "learning_rate": self.learning_rate}
        size = self.completions // 2 if method == "DPO" else self.completions
        shared |= {"per_device_train_batch_size": size, "eval_steps": self.eval_steps}
        if method not in ("SFT", "DPO"):
            shared["num_generations"] = self.num_generations
        sampler = task.sampler_for(policy, **(EPISODE if policy.denoises else {}))
        shared["max_completion_length"] = sampler.pop("max_new_tokens")
        return made(**shared, **fixed, **own, sampler=sampler)

    def rows(self, method: str, task: Task) -> list[dict]:
        """Each prompt is asked once; SFT sees as many solutions as others draw completions."""
        group = 1 if method == "SFT" else self.num_generations
        return task.rows("rl", self.updates * self.completions // group)


def train_all(
    name: str, methods: Sequence[str], seeds: Sequence[int], budget: Budget, profile: str
) -> pd.DataFrame:
    """Train the policy of that name by every method with every seed; rows of `metrics.jsonl` with
    columns `arm`, `seed`, and `positions`: computed by the network before the update, in units of
    a million, for sampling, scoring and learning, held-out prompts left out."""
    runs = [train_one(name, method, s, budget, profile) for s in seeds for method in methods]
    return pd.concat(runs, ignore_index=True)


def train_one(name: str, method: str, seed: int, budget: Budget, profile: str) -> pd.DataFrame:
    """Train by one method with one seed, or read what an earlier run of the same identity left."""
    policy, task = load_policy(name), load_task("countdown")
    _, train, version, _ = METHODS[method]
    config, rows = budget.config(method, policy, task, seed=seed), budget.rows(method, task)
    identity = {
        "method": method,
        "budget": budget.to_dict(),
        "settings": known(config.settings_for(policy)),
        "policy": policy.fingerprint(),
        "rows": digest(described(rows)),
        "algorithm": version,
    }

    def compute(run: str) -> tuple[pd.DataFrame, dict]:
        folder = runs_folder(profile) / "unified" / run
        held_out = task.rows("validation", budget.eval_prompts)
        given = config.replace(output_dir=str(folder)), held_out, task.metric
        before = policy.positions_computed
        learnt = learns_from(method, policy, task, rows, budget, seed)
        drawn = policy.positions_computed - before
        folder = train(policy, *learnt, *given)
        return with_positions(folder, drawn), {}

    slug = "-".join([Path(name).name, *method.lower().split(), f"s{seed}"])
    frame = cached_table(profile, slug, identity, compute)
    frame.insert(0, "seed", seed)
    frame.insert(0, "arm", method)
    return frame


def learns_from(
    method: str, policy: Policy, task: Task, rows: list[dict], budget: Budget, seed: int
) -> tuple:
    """What a trainer is given between the policy and its settings: rows, or rewards and rows."""
    if method == "SFT":
        return (rows,)
    if method not in ("DPO", "GRPO on a reward model"):
        return task.rewards, rows
    drawing = budget.config("RFT", policy, task, seed=seed)
    pairs = rejection.sampled_pairs(policy, task.rewards, rows, drawing)
    if method == "DPO":
        return (pairs,)
    judge = RewardModel(load_policy(policy.name), name=PROXY)
    judge.fit(pairs)
    return [judge, *task.rewards], rows


def with_positions(folder: Path, drawn: int) -> pd.DataFrame:
    """The log of a run, before which so many positions were computed."""
    frame = pd.DataFrame(read_rows(folder / "metrics.jsonl"))
    names = [name for name in ("token_forwards", "token_forwards/scoring") if name in frame]
    done = frame[names].fillna(0).sum(axis=1)
    done[0] += drawn
    return frame.assign(positions=(done.cumsum() - done) / 1e6)
