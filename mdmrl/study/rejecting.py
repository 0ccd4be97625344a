"""Early rejection inside the rollouts of RL: V stops what it judges poor after half of its steps,
and the positions saved draw another text. What is kept is then no sample of the policy, and its
gradient is that of another law: `selected_gradients` says how far off it points."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.identity import known
from mdmrl.policies import Policy, load_policy
from mdmrl.rl import grpo
from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.logprobs import draw_noise, estimator
from mdmrl.rl.rollout import collect
from mdmrl.rl.values import fit_to_base
from mdmrl.runs import generator_for
from mdmrl.sampling import generate
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.sampling.guided import Guided, calibrate
from mdmrl.sampling.pipeline import Pipeline
from mdmrl.study.pieces import cached_table
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task
from mdmrl.training.data import rows_of_step

VERSION = "rejecting-1"  # part of a piece's identity: raise it when results change
FITTED_TO = {"per_device_train_batch_size": 64, "num_generations": 1, "value_batches": 8}
CALIBRATED_ON = 64  # prompts of the validation split


def guided_draw(policy: Policy, task: Task, config: GRPOConfig, guide: GuideConfig) -> Guided:
    """The sampler of a run with `config`, guided by V of the policy as it is: fitted to rollouts of
    training prompts, its thresholds calibrated on others."""
    sampler = config.sampler_for(policy)
    own = {name: getattr(sampler, name) for name in ("step_sizes", "block_length")}
    own["steps"] = sampler.denoising_steps
    length = {"max_completion_length": config.max_completion_length, "seed": config.seed}
    fitted = PPOConfig(**FITTED_TO, **length, sampler=own)
    values, _ = fit_to_base(policy, task.rewards, task.rows("rl"), fitted)
    prompts = [row["prompt"] for row in task.rows("validation", CALIBRATED_ON)]
    generator = generator_for(config.seed, "calibrate", device=policy.device)
    thresholds = calibrate(policy, prompts, sampler, guide, values.judge, generator)
    return Guided(values.judge, guide, thresholds)


def pipeline_draw(
    policy: Policy, task: Task, config: PPOConfig, guide: dict, **options
) -> Pipeline:
    """The pipeline of a run with `config`, with these `options` of `Pipeline`. With a `guide` V
    judges its units: fitted as the run's own V is, its thresholds calibrated on as many other
    prompts, `CALIBRATED_ON` at most."""
    plain = Pipeline(tuple(task.units), **options)
    if not guide:
        return plain
    values, _ = fit_to_base(policy, task.rewards, task.rows("rl"), config, plain)
    guided = replace(plain, value=values.judge, guide=GuideConfig(**guide))
    count = min(CALIBRATED_ON, config.value_batches * config.per_device_train_batch_size)
    prompts = [row["prompt"] for row in task.rows("validation")[-count:]]  # nobody looks at them
    generator = generator_for(config.seed, "calibrate", device=policy.device)
    return guided.calibrated(policy, prompts, config.sampler_for(policy), generator)


def selected_gradients(
    name: str, config: GRPOConfig, guide: GuideConfig, batches: int, profile: str
) -> pd.DataFrame:
    """GRPO's mean gradient over so many batches before any update, three times: of `plain`
    rollouts, of `plain again`, other ones of the same prompts, and of `guided` ones. A row a pair,
    with their `cosine` and the second's `norm` in units of the first's; the pair of plain ones says
    what chance alone leaves."""
    require(config.beta == 0, f"beta={config.beta}: expected 0, for the reward's gradient alone")
    policy, task, config = load_policy(name), load_task("countdown"), config.replace(log_kl=False)
    identity = {"piece": "selected", "batches": batches, "guide": guide.to_dict()}
    identity |= {"settings": known(config.settings_for(policy)), "policy": policy.fingerprint()}
    identity |= {"version": VERSION, "algorithm": grpo.ALGORITHM, "fitted_to": FITTED_TO}

    def compute(_: str) -> tuple[pd.DataFrame, dict]:
        guided = guided_draw(policy, task, config, guide)
        ways = {"plain": generate, "plain again": generate, "guided": guided}
        found = {k: _mean_gradient(policy, task, config, k, w, batches) for k, w in ways.items()}
        rows = [
            (one, two, torch.cosine_similarity(a, b, dim=0).item(), (b.norm() / a.norm()).item())
            for (one, a), (two, b) in combinations(found.items(), 2)
        ]
        return pd.DataFrame(rows, columns=["first", "second", "cosine", "norm"]), {}

    since = {"settings": known(GRPOConfig().settings_for(policy))}
    return cached_table(profile, f"{Path(name).name}-selected", identity, compute, since)


def _mean_gradient(policy, task: Task, config: GRPOConfig, purpose, draw, batches) -> Tensor:
    scorer, sampler = estimator(config.logp_estimator, policy), config.sampler_for(policy)
    parameters, total = policy.trainable_parameters(), 0.0
    for step in range(batches):
        rows = rows_of_step(task.rows("rl"), config.prompts_per_process, step, 0, 1, config.seed)
        random = generator_for(config.seed, purpose, step, device=policy.device)
        asked = rows, task.rewards, config.num_generations, sampler, random
        rollout, *_ = collect(policy, *asked, record=True, draw=draw)
        rollout = rollout.whole()
        noise = draw_noise(rollout, config.p_mask_prompt, random, scorer.samples, scorer.shared)
        grpo.update(policy, rollout, scorer, noise, None, parameters, config)
        total = total + torch.cat([p.grad.flatten() for p in parameters.values()]) / batches
    return total
