"""Scoring a rollout micro-batch by micro-batch, outside of an update's gradient."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mdmrl.policies import Policy
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.logprobs import Noise
from mdmrl.rl.objectives import charge, of_tokens
from mdmrl.rl.rollout import Rollout, group_advantages
from mdmrl.sampling.config import LARGEST

BAND = 1.5  # times the target, or a part of it, that the KL may be
TOLERANCE = 1e-5  # of what must be 1 or 0 at the first inner step


@torch.no_grad()
def score_in_parts(
    policy: Policy, rollout: Rollout, scorer: Callable, noise: Noise, config: GRPOConfig
) -> Tensor:
    """Log-probabilities under the policy as it is, micro-batch by micro-batch, (B, L) or (B,)."""
    parts = config.micro_batches(len(rollout))
    return torch.cat([scorer(policy, rollout.select(p), noise.select(p)) for p in parts])


def charged(
    policy: Policy, rollout: Rollout, scorer: Callable, noise: Noise, config: GRPOConfig
) -> tuple[Rollout, float]:
    """The rollout with advantages of r_i less its KL's charge, and the mean charge."""
    with policy.together():
        logp = score_in_parts(policy, rollout, scorer, noise, config)
        with policy.reference():
            ref = score_in_parts(policy, rollout, scorer, noise.reference or noise, config)
    cost = charge(logp, ref, rollout, config)
    left = rollout.rewards.cpu() - cost.cpu()
    advantages, _ = group_advantages(left, config.num_generations, config.scale_rewards)
    return replace(rollout, advantages=advantages.to(policy.device)), cost.mean().item()


def adapted(beta: float, kl: float, target_kl: float) -> float:
    """The weight of the next update's KL, whose last value was `kl`: twice `beta` where that is
    more than 1.5 times the target, half of it where it is less than the target over 1.5 (Schulman
    et al. 2017, PPO, section 4). In between the KL may oscillate. It stays a number that is not 0,
    however long a policy stands still or runs away."""
    if kl > target_kl * BAND:
        return min(beta * 2, LARGEST)
    return max(beta / 2, 1 / LARGEST) if kl < target_kl / BAND else beta


def check_ratio(
    policy: Policy, rollout: Rollout, scorer: Callable, noise: Noise, config: GRPOConfig
) -> None:
    """Before an update the new policy, scored as `update` does, must be the old one, scored as
    `score_in_parts` does: a ratio off 1 by more than `TOLERANCE` is a RuntimeError."""
    part = config.micro_batches(len(rollout))[0]
    rollout, noise = rollout.select(part), noise.select(part)
    both = scorer(policy, rollout, noise), score_in_parts(policy, rollout, scorer, noise, config)
    new, old = (of_tokens(x.detach(), rollout.completion_mask).flatten() for x in both)
    off = ((new - old).exp() - 1).abs()
    worst = off.argmax()
    if off[worst] > TOLERANCE:  # one that is not a number is for the update to find
        raise RuntimeError(
            f"before any update the new policy gives a log-probability of {new[worst]:.7g} where "
            f"the old one gives {old[worst]:.7g}, a ratio {off[worst]:.1e} off 1: the network "
            "scores the same tokens differently (dropout that is on? other masks? another "
            "attention, or kernels that are not deterministic?)"
        )
