"""With which probability a sampler's step reveals just the positions that it did."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.config import require, resolve
from mdmrl.policies import Policy
from mdmrl.rl.rollout import Rollout


@dataclass
class Choice:
    """What one step of every row chose.

    logits: (N, V) at the masked positions, `masked` (B, L). last: which of these are revealed after
    all others, (N,) bool. chosen: (B, L) bool, some of `masked`. block_length: positions are chosen
    within blocks. rollout: tokens, order and sampler.
    """

    rollout: Rollout
    logits: Tensor
    masked: Tensor
    last: Tensor
    chosen: Tensor
    block_length: int

    def table(self, values: Tensor, elsewhere: float) -> Tensor:
        """Values (N,) where masked, by block, (B, blocks, K)."""
        full = values.new_full(self.masked.shape, elsewhere)
        return self.by_block(full.masked_scatter(self.masked, values))

    def by_block(self, values: Tensor) -> Tensor:
        """Values (B, L), by block, (B, blocks, K)."""
        return values.unflatten(1, (-1, self.block_length))


def log_choice(
    policy: Policy, rollout: Rollout, logits: Tensor, masked: Tensor, chosen: Tensor
) -> Tensor:
    """The log-probability that a step reveals just `chosen` (B, L), some of `masked` (B, L), given
    the tokens there, (B,); logits: (N, V) at `masked`. Of some samplers it is not known.
    """
    sampler = rollout.sampler
    require(
        not sampler.parallel,
        f"threshold={sampler.threshold}, entropy_bound={sampler.entropy_bound}: the probability of "
        "positions is known only for samplers that reveal a given number a step",
    )
    law = in_order if sampler.order_temperature else sampler.rule.log_choice
    require(
        law is not None,
        f"remasking={sampler.rule.name}: nothing says with which probability it chooses positions; "
        "give Rule(..., log_choice=...), or an estimator that needs none, such as 'trajectory'",
    )
    ends = torch.tensor(policy.end_token_ids, device=masked.device)
    last = torch.isin(logits.argmax(-1), ends) & sampler.end_last
    step = Choice(rollout, logits, masked, last, chosen, rollout.block_length(policy))
    return resolve(law)(step)


def certain(step: Choice) -> Tensor:
    """The state alone decides."""
    return torch.zeros(len(step.masked), device=step.masked.device)


def in_order(step: Choice) -> Tensor:
    """Plackett and Luce's law of the order in which they were chosen."""
    rollout, positions = step.rollout, step.masked.nonzero()[:, 1]
    # A rule that order_temperature takes looks at the state alone, not at tokens.
    columns = positions + rollout.prompt_ids.shape[1]
    scores = rollout.sampler.rule(step.logits, positions, positions, columns, None)
    scores = step.table(scores, -math.inf) / rollout.sampler.order_temperature
    taken, place = step.by_block(step.chosen), step.by_block(rollout.place)
    # Row i of the last two axes: what is left when i is chosen, i included.
    gone = taken[..., None, :] & (place[..., None, :] < place[..., None])
    left = scores[..., None, :].masked_fill(gone, -math.inf)
    left = left.masked_fill(~taken[..., None], 0.0).logsumexp(-1)
    return torch.where(taken, scores - left, 0.0).flatten(1).sum(1)


def any_set(step: Choice) -> Tensor:
    """All sets of positions alike; those whose turn comes last among themselves."""
    total = torch.zeros(len(step.masked), device=step.masked.device)
    for turn in (~step.last, step.last):
        open_ = step.table(turn, False)
        size, taken = (m.sum(-1) for m in (open_, open_ & step.by_block(step.chosen)))
        total = total - log_binomial(size, taken).sum(1)
    return total


def log_binomial(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of n over k."""
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()


def others_less_probable(step: Choice) -> Tensor:
    """That all other tokens drawn are less probable than the least probable one revealed.

    It jumps where tokens change places, so that its gradient does not tell all.
    """
    chosen, last = step.by_block(step.chosen), step.table(step.last, False)
    logp, tokens = step.logits.log_softmax(-1), step.rollout.completion_ids[step.masked]
    own = step.table(logp.gather(1, tokens[:, None])[:, 0], math.inf)
    to_the_last = (chosen & last).any(-1, keepdim=True)  # none but last ones are left to compete
    own = own.masked_fill(~chosen | (last != to_the_last), math.inf)
    least = own.amin(-1, keepdim=True).expand(own.shape)  # infinite: no contest
    least = least.masked_fill(last & ~to_the_last, math.inf)
    least = least.masked_fill(~last & to_the_last, -math.inf)
    less = (step.logits / step.rollout.temperature).log_softmax(-1)
    less = less.masked_fill(logp >= least.flatten(1)[step.masked][:, None], -math.inf).logsumexp(-1)
    return step.table(less, 0.0).masked_fill(chosen, 0.0).flatten(1).sum(1)
