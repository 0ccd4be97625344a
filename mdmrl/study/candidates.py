"""What might predict how much RL gains with an estimator of log p, measured of a policy as it is.

An estimator gives GRPO a gradient for the completions of a few prompts. Five candidates, each one
number (`NAMES`):

 * `cosine` of it with the gradient by the sampler's own likelihood (`trajectory`), summed over the
   same completions; `cosine apart`, with that of other completions, which tells how much of it is
   the noise of the completions that both share;
 * `norm`, log of its norm over that of the sampler's own;
 * `effect`, what one step of the optimizer along it adds to the probability of a right answer on
   held-out items, exactly (`mdmrl.study.parallel`), the mean over batches;
 * `sharpening`, what that step takes off the entropy of the marginals of an empty canvas, in nats a
   position: what `one_step` trains directly.

The step is AdamW's first, whatever the moments of a run that is under way: all weights move by the
learning rate. Spearman's correlation with the gains that RL then had says which of them predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from mdmrl.config import Config, require
from mdmrl.evaluation.stats import Interval
from mdmrl.policies import Policy
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import update
from mdmrl.rl.logprobs import draw_noise, estimator
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig
from mdmrl.sampling.denoise import Canvas
from mdmrl.study.parallel import right_solutions
from mdmrl.tasks.base import Task
from mdmrl.training.data import rows_of_step

NAMES = ("cosine", "cosine apart", "norm", "effect", "sharpening")
WHEN = ("before", "along")  # training
COLUMNS = [*product(WHEN, NAMES)]
DRAWS = 2000  # of the bootstrap


@dataclass
class Candidates(Config):
    """How much is measured: `batches`, at least 2, of the size of an update, and `items` of the
    held-out ones."""

    batches: int = 4
    items: int = 32

    def validate(self) -> None:
        require(self.batches >= 2, f"batches={self.batches}: expected at least 2, to set apart")


def measured(
    policy: Policy, task: Task, held_out: Sequence[dict], config: GRPOConfig, asked: Candidates
) -> dict[str, float]:
    """The candidates, by `NAMES`, of a masked diffusion policy for Countdown under the settings of
    a GRPO run, without a KL term. The policy is left as it was."""
    config = config.replace(beta=0.0, log_kl=False, log_gradients=False)
    sampler, items = config.sampler_for(policy), held_out[: asked.items]
    weights = [*policy.trainable_parameters().values()]
    rows, own, path = task.rows("rl"), [], []
    for batch in range(asked.batches):
        rollout = _rollout(policy, task, rows, config, sampler, batch)
        for gradients, name in ((own, config.logp_estimator), (path, "trajectory")):
            gradients.append(_gradient(policy, rollout, name, config, batch))
    before = _looks(policy, items, sampler)
    moved = []
    for gradient in own:
        kept = [weight.detach().clone() for weight in weights]
        _step(weights, gradient, config)
        moved.append(_looks(policy, items, sampler) - before)
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)
    (ours, theirs), (right, entropy) = map(torch.stack, (own, path)), np.mean(moved, axis=0)
    return {
        "cosine": _cosine(ours.sum(0), theirs.sum(0)),
        "cosine apart": np.mean(
            [_cosine(ours[i::2].sum(0), theirs[1 - i :: 2].sum(0)) for i in range(2)]
        ).item(),
        "norm": (ours.sum(0).norm() / theirs.sum(0).norm()).log().item(),
        "effect": right.item(),
        "sharpening": -entropy.item(),
    }


def _rollout(
    policy: Policy,
    task: Task,
    rows: Sequence[dict],
    config: GRPOConfig,
    sampler: SamplerConfig,
    batch: int,
) -> Rollout:
    asked = config.prompts_per_process, batch, 0, 1, config.seed
    prompts = rows_of_step(rows, *asked)
    random = generator_for(config.seed, "candidates", batch, device=policy.device)
    drawn_by = sampler.replace(stop_at_end=False)
    n, scale = config.num_generations, config.scale_rewards
    rollout, *_ = collect(
        policy, prompts, task.rewards, n, drawn_by, random, record=True, scale_rewards=scale
    )
    return rollout


def _gradient(policy: Policy, rollout: Rollout, name: str, config: GRPOConfig, batch: int):
    """GRPO's gradient by that estimator, one flat vector."""
    scorer = estimator(name, policy)
    rollout = rollout.whole() if scorer.records else rollout
    random = generator_for(config.seed, "noise", batch, device=policy.device)
    noise = draw_noise(rollout, config.p_mask_prompt, random, scorer.samples, scorer.shared)
    parameters = policy.trainable_parameters()
    update(policy, rollout, scorer, noise, None, parameters, config)
    found = torch.cat([weight.grad.flatten() for weight in parameters.values()])
    for weight in parameters.values():
        weight.grad = None
    return found


def _step(weights: list[Tensor], gradient: Tensor, config: GRPOConfig) -> None:
    for weight, part in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
        weight.grad = part.view_as(weight).clone()
    torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    optimizer.step()
    optimizer.zero_grad()


def _looks(policy: Policy, items: Sequence[dict], sampler: SamplerConfig) -> np.ndarray:
    """The mean probability of a right answer and the mean entropy of an empty canvas, (2,)."""
    right = right_solutions(policy, items, sampler).right.mean()
    return np.array([right, empty_canvas_entropy(policy, items, sampler.max_new_tokens)])


@torch.no_grad()
def empty_canvas_entropy(policy: Policy, rows: Sequence[dict], length: int) -> float:
    """The mean entropy, in nats a position, of what each of `length` masked positions may become
    while all others are masked, [MASK] itself apart."""
    prompts = policy.encode([row["prompt"] for row in rows], length)
    canvas = Canvas.behind(prompts, length, policy.mask_token_id)
    logits = policy.logits(canvas.ids, canvas.attention)[:, canvas.width :].float()
    logits[..., policy.mask_token_id] = -torch.inf
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def _cosine(one: Tensor, other: Tensor) -> float:
    return torch.cosine_similarity(one, other, 0).item()


def beside(runs: pd.DataFrame, gains: pd.Series | None = None) -> pd.DataFrame:
    """The candidates of runs in whose logs they were measured, a column each of `COLUMNS`, as
    "cosine, before"; and, where they are given, the `gains` that those arms had, as `gain`. Both
    have the index (arm, seed)."""
    columns = [f"eval/{name}" for name in NAMES]
    looked = runs.reindex(columns=["arm", "seed", "step", *columns])
    looked = looked.dropna(subset=["eval/effect"])
    parts = looked[looked.step == 0], looked[looked.step > 0]
    found = {}
    for when, part in zip(WHEN, parts, strict=True):
        means = part.groupby(["arm", "seed"], sort=False)
        found |= {f"{name}, {when}": means[f"eval/{name}"].mean() for name in NAMES}
    table = pd.DataFrame(found)
    return table if gains is None else table.join(gains.rename("gain"), how="left")


def correlation(table: pd.DataFrame, candidate: str, gain: str) -> Interval:
    """Spearman's correlation of two columns over rows with index (arm, seed). The interval is
    that of a bootstrap which draws arms and seeds both, as a claim about other estimators on other
    checkpoints has to; its ends are nan with fewer than three arms."""
    values = table[[candidate, gain]].dropna()
    by_cell = values.groupby(level=["arm", "seed"]).mean()
    arms, seeds = (by_cell.index.unique(level).to_numpy() for level in ("arm", "seed"))
    grids = [by_cell[name].unstack("seed").loc[arms, seeds].to_numpy() for name in by_cell]

    def spearman(rows: np.ndarray, columns: np.ndarray) -> float:
        one, other = (grid[np.ix_(rows, columns)].ravel() for grid in grids)
        there = np.isfinite(one)
        if np.ptp(one[there]) == 0 or np.ptp(other[there]) == 0:
            return np.nan  # all the same arm
        return float(spearmanr(one[there], other[there]).statistic)

    sizes, random = (len(arms), len(seeds)), np.random.default_rng(0)
    estimate = spearman(*map(np.arange, sizes))
    if len(arms) < 3:
        return Interval(estimate, np.nan, np.nan)
    drawn = [spearman(*(random.integers(n, size=n) for n in sizes)) for _ in range(DRAWS)]
    return Interval(estimate, *np.nanquantile(drawn, (0.025, 0.975)).tolist())
