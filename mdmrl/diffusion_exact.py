"""Masked diffusion without sampling: every set of masked positions of a short text, enumerated.

A denoiser here is any function from canvases (N, L) to log mu_theta (N, L, V): a table, the
conditionals of a known law, a trained model. Its rows at unmasked positions are never used. It is
called with 2^n canvases a text, n = L or the length of a block, so n stays below about 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mdmrl.config import require
from mdmrl.diffusion import MaskedNLL, Schedule

Denoiser = Callable[[Tensor], Tensor]


def exact_masked_nll(
    denoiser: Denoiser, x0: Tensor, mask_token_id: int, block_length: int | None = None
) -> MaskedNLL:
    """The function c of `mdmrl.diffusion` for texts (N, L), its expectation in closed form: from
    probabilities of being unmasked, (K,), to nats, (N, K).

    With a `block_length` c is summed over blocks, which makes every loss that of block diffusion.
    """
    n = block_length or x0.shape[1]
    masked, logps = sets(n), _true_logps(denoiser, x0, mask_token_id, n)
    nll = -sum(torch.where(masked, logp, 0).sum(-1) for logp in logps)
    size = masked.sum(-1)

    def masked_nll(alpha: Tensor) -> Tensor:
        chance = (1 - alpha[:, None]) ** size * alpha[:, None] ** (n - size)  # (K, 2^n)
        return nll @ chance.T.to(nll.dtype)

    return masked_nll


def chain_log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    mask_token_id: int,
    schedule: Schedule,
    steps: int,
    block_length: int | None = None,
) -> Tensor:
    """log p_theta(x_0) of the reverse process of `steps` steps (in each block), (N,) nats: what the
    ELBO bounds, summed over all ways to reveal x_0 by dynamic programming over the masked sets."""
    n = block_length or x0.shape[1]
    masked = sets(n)
    before, after = masked[:, None], masked[None]  # of the sets S and R, those at t and at s
    revealed = before & ~after  # (S, R, n)
    possible = ~(after & ~before).any(-1)
    alpha = schedule.alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    total = torch.zeros(len(x0), dtype=torch.float64)
    for logp in _true_logps(denoiser, x0, mask_token_id, n):
        tokens = torch.where(revealed, logp[:, :, None], 0).sum(-1).exp() * possible  # (N, S, R)
        likelihood = torch.eye(1, len(masked), dtype=torch.float64).expand(len(x0), -1)  # at t = 0
        for alpha_s, alpha_t in pairwise(alpha):
            chance = (alpha_s - alpha_t) / (1 - alpha_t)
            moves = chance ** revealed.sum(-1) * (1 - chance) ** after.sum(-1)
            likelihood = ((tokens * moves) @ likelihood[..., None]).squeeze(-1)
        total += likelihood[:, -1].log()
    return total


def conditionals(joint: Tensor) -> Denoiser:
    """The denoiser that knows the law of the data: mu^i(k | x_t) = p(x^i = k | the unmasked).

    Args:
        joint: p(x), positive, one axis of m tokens a position; [MASK] is token m.
    """
    m, length = joint.shape[0], joint.ndim
    for axis in range(length):  # index m of an axis: that position summed out
        joint = torch.cat([joint, joint.sum(axis, keepdim=True)], axis)
    strides = (m + 1) ** torch.arange(length - 1, -1, -1)

    def denoiser(xt: Tensor) -> Tensor:
        filled = (torch.arange(m) - xt[..., None]) * strides[:, None]  # token k at position i
        p = joint.flatten()[(xt * strides).sum(-1)[:, None, None] + filled]
        return F.pad(p.log().log_softmax(-1), (0, 1), value=-torch.inf)

    return denoiser


def sets(n: int) -> Tensor:
    """All sets of masked positions, (2^n, n) bool: none in the first row, all in the last."""
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1


def canvases(x0: Tensor, mask_token_id: int, n: int) -> Iterator[tuple[slice, Tensor]]:
    """For every block of n positions its place, and the texts (N, L) with each of the `sets` of it
    masked, (N, 2^n, L): the blocks before it clean, those after it all [MASK]."""
    length = x0.shape[1]
    require(length % n == 0, f"block_length={n}: expected a divisor of the length {length}")
    for start in range(0, length, n):
        block = slice(start, start + n)
        xt = x0[:, None].repeat(1, 2**n, 1)
        xt[:, :, block] = xt[:, :, block].masked_fill(sets(n), mask_token_id)
        xt[:, :, block.stop :] = mask_token_id
        yield block, xt


def _true_logps(denoiser: Denoiser, x0: Tensor, mask_token_id: int, n: int) -> Iterator[Tensor]:
    """Block by block, log mu of the true tokens given every set of masked ones, (N, 2^n, n)."""
    for block, xt in canvases(x0, mask_token_id, n):
        log_mu = denoiser(xt.flatten(0, 1))[:, block].unflatten(0, xt.shape[:2])
        targets = x0[:, None, block, None].expand(-1, 2**n, -1, -1)
        yield log_mu.gather(-1, targets).squeeze(-1)
