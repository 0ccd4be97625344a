"""With which probability a sampler's step reveals just the positions that it did.

0 in logarithms where the state alone decides (`state_confidence`, `sequential` and others).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.rl.rollout import Rollout
from mdmrl.sampling.choose import POSTPONED


def log_choice(
    policy: Policy, rollout: Rollout, logits: Tensor, masked: Tensor, chosen: Tensor
) -> Tensor:
    """The log-probability that a step reveals just `chosen`, given the tokens there, (B,).

    Args:
        logits: (N, V) at `masked` (B, L); chosen: (B, L), some of these.
    """
    sampler = rollout.sampler
    require(
        not sampler.parallel,
        f"threshold={sampler.threshold}, entropy_bound={sampler.entropy_bound}: the probability of "
        "positions is known only for samplers that reveal a given number a step",
    )
    blocks = (-1, rollout.block_length(policy))
    if sampler.order_temperature:
        return _in_order(rollout, logits, masked, chosen, blocks)
    ends = torch.tensor(policy.end_token_ids, device=masked.device)
    last = torch.isin(logits.argmax(-1), ends) & sampler.end_last
    if sampler.remasking == "random":
        return _any(masked, chosen, last, blocks)
    if sampler.remasking == "low_confidence":
        return _others_less_probable(rollout, logits, masked, chosen, last, blocks)
    return torch.zeros(len(masked), device=masked.device)


def _in_order(
    rollout: Rollout, logits: Tensor, masked: Tensor, chosen: Tensor, blocks: tuple[int, int]
) -> Tensor:
    """Plackett and Luce's law of the order in which they were chosen."""
    confidence = logits.amax(-1) - logits.logsumexp(-1)
    score = confidence.new_full(masked.shape, -math.inf).masked_scatter(masked, confidence)
    score = score.unflatten(1, blocks) / rollout.sampler.order_temperature  # (B, blocks, K)
    taken, place = (x.unflatten(1, blocks) for x in (chosen, rollout.place))
    # Row i of the last two axes: what is left when i is chosen, i included.
    gone = taken[..., None, :] & (place[..., None, :] < place[..., None])
    left = score[..., None, :].masked_fill(gone, -math.inf)
    left = left.masked_fill(~taken[..., None], 0.0).logsumexp(-1)
    return torch.where(taken, score - left, 0.0).flatten(1).sum(1)


def _any(masked: Tensor, chosen: Tensor, last: Tensor, blocks: tuple[int, int]) -> Tensor:
    """All sets of positions alike; those whose turn comes `last` (N,) among themselves."""
    total = torch.zeros(len(masked), device=masked.device)
    for turn in (~last, last):
        open_ = torch.zeros_like(masked).masked_scatter(masked, turn)
        size, taken = (m.unflatten(1, blocks).sum(-1) for m in (open_, open_ & chosen))
        ways = (size + 1).lgamma() - (taken + 1).lgamma() - (size - taken + 1).lgamma()
        total = total - ways.sum(1)
    return total


def _others_less_probable(
    rollout: Rollout,
    logits: Tensor,
    masked: Tensor,
    chosen: Tensor,
    last: Tensor,
    blocks: tuple[int, int],
) -> Tensor:
    """That all other tokens drawn are less probable than the least probable one revealed.

    It jumps where tokens change places, so that its gradient does not tell all.
    """

    def scatter(values: Tensor, elsewhere: float) -> Tensor:  # (N,) -> (B, L)
        full = values.new_full(masked.shape, elsewhere)
        return full.masked_scatter(masked, values)

    rank = logits.log_softmax(-1).double() - POSTPONED * last[:, None]
    own = rank.gather(1, rollout.completion_ids[masked][:, None])[:, 0]
    own = scatter(own, math.inf).masked_fill(~chosen, math.inf).unflatten(1, blocks)
    least = own.amin(-1, keepdim=True).expand(own.shape).flatten(1)[masked]  # infinite: no contest
    less = (logits / rollout.temperature).log_softmax(-1)
    less = less.masked_fill(rank >= least[:, None], -math.inf).logsumexp(-1)
    return scatter(less, 0.0).masked_fill(chosen, 0.0).sum(1)
