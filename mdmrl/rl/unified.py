"""Six ways to train as one gradient (Shao et al. 2024, DeepSeekMath, section 5.2; Fig. 5-1).

With completions o of prompts q from some source of data, every one of them follows

    E sum_t w(o) GC(q, o, t) grad log pi(o_t | q, o_<t)

and they differ in the source, in the reward, and in the gradient coefficient GC; w is the average
that the trainer takes. `METHODS` has the rows of the table. Of a policy that denoises log pi(o_t)
is what the trainer's estimator gives; of one of log pi(o) as a whole every token has an equal part,
and of the supervised losses a token counts where it is masked, by the weight of its time.

As they are trained here, so that GC holds what the paper leaves out: the ratio to the old policy
and where it is clipped, and for GRPO any form of the KL. PPO's KL is over the whole vocabulary, and
no coefficient of the tokens that were drawn: beta is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.kl import WITH_RATIO, kl_form
from mdmrl.rl.preference import DPOConfig


@dataclass
class Scored:
    """B completions and what decides their coefficients.

    mask: the tokens that count, (B, L) bool. rewards: (B,). advantages: (B,) of GRPO, (B, L) of
    PPO. change, d: log pi - log pi_old and log pi - log pi_ref of tokens, (B, L); of DPO a chosen
    completion stands before its rejected one. config: the trainer's.
    """

    mask: Tensor
    config: object
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    change: Tensor | None = None
    d: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table: `data`, `reward` and `formula` in words; the coefficient GC, and the
    weight w of every token, (B, L) or (B, 1), as functions of what was `Scored`."""

    data: str
    reward: str
    formula: str
    coefficient: Callable[[Scored], Tensor]
    weight: Callable[[Scored], Tensor]

    def objective(self, scored: Scored, logp: Tensor) -> Tensor:
        """What the method climbs: its gradient is the formula's, from log pi (B, L) of tokens."""
        factor = (self.weight(scored) * self.coefficient(scored)).detach()
        return torch.where(scored.mask, factor * logp, 0.0).sum()


def always(scored: Scored) -> Tensor:
    """1: every completion is right."""
    return scored.mask.to(torch.get_default_dtype())


def if_right(scored: Scored) -> Tensor:
    """1 where the reward reaches the threshold, else 0."""
    return always(scored) * (scored.rewards >= scored.config.reward_threshold)[:, None]


def of_pair(scored: Scored) -> Tensor:
    """beta sigmoid(-m) for a chosen completion and minus it for a rejected one, with the margin
    m = beta (sum of d of the chosen - that of the rejected)."""
    config: DPOConfig = scored.config
    chosen, rejected = torch.where(scored.mask, scored.d, 0.0).sum(1).unflatten(0, (-1, 2)).T
    wrong = config.beta * torch.sigmoid(-config.beta * (chosen - rejected))
    return torch.stack([wrong, -wrong], 1).flatten()[:, None]


def if_not_clipped(scored: Scored) -> Tensor:
    """rho A, or 0 where the one-sided clip holds the ratio."""
    config: GRPOConfig | PPOConfig = scored.config
    advantages = scored.advantages.view(len(scored.mask), -1)
    ratio, high = scored.change.exp(), config.epsilon_high or config.epsilon
    beyond = torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - config.epsilon)
    return torch.where(beyond, 0.0, ratio * advantages)


def less_kl(scored: Scored) -> Tensor:
    """rho A as above, minus beta times the slope of the KL's form at d: 1 - exp(-d) for k3, which
    is the paper's beta (pi_ref / pi - 1); of k3_ratio that of the product with rho."""
    form = kl_form(scored.config.kl_estimator)
    with torch.enable_grad():
        d = scored.d.detach().requires_grad_()
        (slope,) = torch.autograd.grad(form(d).sum(), d)
    if scored.config.kl_estimator == WITH_RATIO:
        slope = scored.change.exp() * (slope + form(scored.d))
    return if_not_clipped(scored) - scored.config.beta * slope


# The averages: over all tokens, those of right completions times their share, a sum over tokens and
# a mean over pairs, a constant length, the tokens of each completion.


def over_tokens(scored: Scored) -> Tensor:
    return 1 / scored.mask.sum()


def over_right_tokens(scored: Scored) -> Tensor:
    right = scored.rewards >= scored.config.reward_threshold
    share = right.sum() / len(right) if scored.config.online else 1.0
    return share / scored.mask[right].sum().clamp(min=1)


def over_pairs(scored: Scored) -> Tensor:
    return torch.tensor(2 / len(scored.mask))


def over_length(scored: Scored) -> Tensor:
    return torch.tensor(1 / (len(scored.mask) * scored.config.max_completion_length))


def over_completions(scored: Scored) -> Tensor:
    return 1 / (len(scored.mask) * scored.mask.sum(1, keepdim=True))


START, NOW = "drawn from the starting policy", "drawn from the policy as it is"
METHODS = {
    "SFT": Method("reference solutions", "none: all are right", "1", always, over_tokens),
    "RFT": Method(f"{START}, right ones kept", "rule", "1[right]", if_right, over_right_tokens),
    "Online RFT": Method(NOW, "rule", "1[right]", if_right, over_right_tokens),
    "DPO": Method(
        f"{START}, a right one beside a wrong one",
        "rule, of two completions",
        "± β σ(β d(o-) - β d(o+)), d = log π - log π_ref",
        of_pair,
        over_pairs,
    ),
    "PPO": Method(NOW, "rule, and V", "ρ A_t where not clipped", if_not_clipped, over_length),
    "GRPO": Method(
        NOW,
        "rule, in its group",
        "ρ A_i where not clipped - β KL'(d)",
        less_kl,
        over_completions,
    ),
}
