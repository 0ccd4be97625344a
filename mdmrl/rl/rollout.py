"""What one round of sampling gives to learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from mdmrl.config import require
from mdmrl.evaluation.accuracy import completion_metrics
from mdmrl.policies import Policy
from mdmrl.rewards import RewardLog, reward_name, reward_values, total_reward
from mdmrl.sampling import SamplerConfig, SamplerOutput, generate


@dataclass
class Rollout:
    """Prompts, completions and advantages; rows of one group are adjacent.

    prompt_ids, prompt_mask: (B, P), left-padded. completion_ids: (B, L). completion_mask: (B, L),
    True up to and including the first end token; loss, KL and metrics count these positions.
    advantages: (B,). counted: (B,), False for samples that all rewards left out of their group.
    sampler: what drew them; scoring applies its temperature. rewards: (B,), NaN where left out.
    truncated: (B,), samples that the loss leaves out for having no end; None for none.
    logprobs: (B, L), as the tokens were drawn. revealed_at: (B, L), the denoising step that
    revealed each position, -1 where none did; place: (B, L), its place among those of that step, in
    the order drawn; both None unless the trajectory was recorded. seen: (B, L), positions that the
    network sees; None for all.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    advantages: Tensor
    counted: Tensor
    sampler: SamplerConfig
    rewards: Tensor | None = None
    logprobs: Tensor | None = None
    revealed_at: Tensor | None = None
    place: Tensor | None = None
    truncated: Tensor | None = None
    seen: Tensor | None = None

    @property
    def learnt(self) -> Tensor:
        """Samples that the loss is made of, (B,)."""
        return self.counted if self.truncated is None else self.counted & ~self.truncated

    @classmethod
    def of(
        cls, output: SamplerOutput, advantages: Tensor, counted: Tensor, sampler, rewards=None
    ) -> Rollout:
        """What `sampler` drew; a recorded trajectory that masks tokens again is an InputError."""
        width = output.sequences.shape[1] - output.completion_ids.shape[1]
        revealed_at = place = None
        if output.trajectory is not None:
            require(
                not sampler.revise,
                f"revise={sampler.revise}: expected 0, since learning from a trajectory takes one "
                "that reveals every token once",
            )
            revealed_at, place = output.completion_ids.new_full((2, *output.logprobs.shape), -1)
            for index, step in enumerate(output.trajectory):
                revealed_at[step.rows, step.positions] = index
                before = torch.searchsorted(step.rows, step.rows)  # rows are sorted
                place[step.rows, step.positions] = torch.arange(len(before)).to(before) - before
        prompts = output.sequences[:, :width], output.prompt_mask
        completions = output.completion_ids, output.completion_mask
        steps = {"logprobs": output.logprobs, "revealed_at": revealed_at, "place": place}
        steps["seen"] = output.seen
        return cls(*prompts, *completions, advantages, counted, sampler, rewards, **steps)

    @property
    def temperature(self) -> float:
        """What scoring divides logits by: the sampler's temperature, or 1 for a greedy one."""
        return self.sampler.temperature or 1.0

    def block_length(self, policy: Policy) -> int:
        """Positions of a block that `policy` wrote at a time; L where it wrote all at once."""
        own = self.sampler.block_length or policy.block_length
        return own or self.completion_ids.shape[1]

    def whole(self) -> Rollout:
        """The same, every revealed position counting; its trajectory must have been recorded."""
        known = self.revealed_at is not None
        require(known, "this rollout has no trajectory: collect it with record=True")
        return replace(self, completion_mask=self.revealed_at >= 0)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, chosen: slice | Tensor) -> Rollout:
        """The same for some of the rows, a slice or a mask of them."""
        values = (getattr(self, field.name) for field in fields(self))
        return Rollout(*(v[chosen] if isinstance(v, Tensor) else v for v in values))

    def narrowed(self) -> Rollout:
        """The same without columns in which no prompt has a token."""
        first = int(self.prompt_mask.any(0).long().argmax())
        prompts = self.prompt_ids[:, first:], self.prompt_mask[:, first:]
        return replace(self, prompt_ids=prompts[0], prompt_mask=prompts[1])


def group_advantages(
    rewards: Tensor, num_generations: int, scale: str = "group"
) -> tuple[Tensor, Tensor]:
    """Advantages (r - mean) / (std + 1e-4) within each group of `num_generations` rows, and which
    samples count, both (B,).

    A group of equal rewards, or with fewer than two samples that count, gets 0. NaN marks a sample
    that is left out of its group. `scale` says whose standard deviation (ddof 1) it is: that of the
    `group`, of the whole `batch` on all processes, or `none`: advantages are differences.
    """
    groups = rewards.view(-1, num_generations)
    counted = ~groups.isnan()
    n = counted.sum(1, keepdim=True)
    centred = torch.where(counted, groups - groups.nanmean(1, keepdim=True), 0.0)
    equal = (centred.abs().amax(1, keepdim=True) < 1e-9) | (n < 2)
    if scale == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    elif scale == "batch":
        everywhere = torch.tensor(gather_object(rewards.tolist()), dtype=rewards.dtype)
        spoken = everywhere[~everywhere.isnan()]
        std = spoken.std() if len(spoken) > 1 else 0.0
    scaled = centred if scale == "none" else centred / (std + 1e-4)
    return torch.where(equal, 0.0, scaled).flatten().float(), counted.flatten()


def collect(
    policy: Policy,
    batch: Sequence[dict],
    rewards: Sequence[Callable],
    num_generations: int,
    sampler: SamplerConfig,
    generator: torch.Generator,
    record: bool = False,
    draw: Callable = generate,
    reward_weights: Sequence[float] | None = None,
    scale_rewards: str = "group",
    watch: Callable | None = None,
    log: RewardLog | None = None,
) -> tuple[Rollout, dict[str, float | None], dict]:
    """Draw and score one group of completions for each row of `batch`.

    Args:
        record: keep the denoising trajectory; draw: what completes the prompts.
        scale_rewards: see `group_advantages`; log: takes what rewards report.
        watch: what a task watches in completions, see `Task`.
    Returns:
        the rollout, the round's metrics, and the first group's texts and rewards to look at.
    """
    start = time.perf_counter()
    rows = [row for row in batch for _ in range(num_generations)]
    prompts = [row["prompt"] for row in rows]
    output = draw(policy, prompts, sampler, generator, record)
    drawn = time.perf_counter()
    log = log or RewardLog()
    written = output.completions, output.token_lists()
    values = reward_values(rewards, prompts, *written, rows, **log.offered)
    total = total_reward(values, reward_weights)  # NaN where all rewards left the sample out
    advantages, counted = group_advantages(total, num_generations, scale_rewards)
    groups = total.view(-1, num_generations)
    components = zip(map(reward_name, rewards), values.nanmean(0).tolist(), strict=True)
    metrics = {
        "reward": total.nanmean().item(),
        "reward_std": groups.std(1, correction=min(1, num_generations - 1)).nanmean().item(),
        "frac_reward_zero_std": (advantages.view_as(groups) == 0).all(1).double().mean().item(),
        **{f"rewards/{name}/mean": value for name, value in components},
        **completion_metrics(policy, output, watch),
        "rollout_time": drawn - start,
        "reward_time": time.perf_counter() - drawn,
        "num_tokens": output.completion_mask.sum().item(),
        "token_forwards": output.token_forwards,
    }
    # A mean of nothing is no number, and must not reach the mean over processes.
    metrics = {name: None if value != value else value for name, value in metrics.items()}
    sample = {
        "prompt": prompts[0],
        "completions": output.completions[:num_generations],
        "rewards": total[:num_generations].tolist(),
        **{name: column[:num_generations] for name, column in log.extras.items()},
    }
    advantages, counted, total = (x.to(policy.device) for x in (advantages, counted, total.float()))
    return Rollout.of(output, advantages, counted, sampler, total), metrics, sample
