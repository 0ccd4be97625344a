"""The mathematics of masked (absorbing-state) diffusion.

The forward process keeps a token with probability alpha_t and replaces it by [MASK] otherwise;
alpha falls from 1 at t = 0 to 0 at t = 1, so the prior is the all-[MASK] sequence. In the
continuous-time limit the negative ELBO is a weighted masked cross-entropy,

    L = E_t [ -alpha'_t / (1 - alpha_t)  sum_{i : x_t^i = m}  -log p_theta(x_0^i | x_t) ],

and for the linear schedule alpha_t = 1 - t the weight is 1/t (Shi et al. 2024, eq. 8;
Sahoo et al. 2024, eq. 10; Nie et al. 2025, eq. 3).
"""

from __future__ import annotations

import torch


def sample_times(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` times t in (0, 1] with weights w such that the mean of w f(t) estimates the integral
    of f(t) / t over (0, 1], without bias.

    t = u^2 with one uniform u in each of `count` equal strata, shuffled: the density 1/(2 sqrt t)
    minimises the variance that the weight 1/t puts on a sum over about t L masked tokens, and the
    strata remove most of what is left (Kingma et al. 2021, section 5).
    """
    offset = torch.rand(count, generator=generator)
    strata = torch.randperm(count, generator=generator)
    u = (strata + 1 - offset) / count
    return u.square(), 2 / u


def mask_tokens(
    x0: torch.Tensor,
    t: torch.Tensor,
    maskable: torch.Tensor,
    mask_token_id: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x_t ~ q(x_t | x_0) under the linear schedule.

    Args:
        x0: token ids, (B, L).
        t: times in (0, 1], (B,).
        maskable: positions the process acts on, (B, L) bool; the others stay clean.
    Returns:
        x_t (B, L) and the masked positions (B, L) bool.
    """
    masked = (torch.rand(x0.shape, generator=generator) < t[:, None]) & maskable
    return torch.where(masked, mask_token_id, x0), masked


def linear_elbo_loss(
    token_nll: torch.Tensor, masked: torch.Tensor, weight: torch.Tensor, maskable: torch.Tensor
) -> torch.Tensor:
    """Monte-Carlo estimate of the limit loss L under alpha_t = 1 - t, in nats per token.

    Args:
        token_nll: -log p_theta(x_0^i | x_t) at the masked positions in row-major order, (N,).
        masked, maskable: (B, L) bool; weight: of each row, from `sample_times`, (B,).
    """
    weights = weight[:, None].expand(masked.shape)[masked]
    return (weights * token_nll).sum() / maskable.sum()
