"""Estimators of log pi(o | q), all of the form `f(policy, rollout, noise) -> (B, L)`.

Per-token log-probabilities in float32, zero outside the completion mask. Several different things
are called log p for a masked diffusion model; each estimator names its own.

    exact      autoregressive factorisation: sum_k log p(o_k | q, o_<k). One forward, unbiased.
    ar_style   the same call on a masked diffusion model: clean text in, no masks, so that every
               token sees itself. One forward; no likelihood of anything. What the thesis did.
    one_step   log p(o_k | q', M^L), the completion all masked and each prompt token masked with
               probability p (Zhao et al. 2025, d1, section 3.1). One forward; without prompt
               masking the exact law of the one-step sampler that may draw [MASK].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.config import require, unknown
from mdmrl.policies.base import Policy
from mdmrl.rl.rollout import Rollout


@dataclass
class Noise:
    """Randomness that new, old and reference policy share: masked prompt positions, (B, P)."""

    prompt_masked: Tensor

    def rows(self, chosen: slice) -> Noise:
        return Noise(self.prompt_masked[chosen])


def draw_noise(rollout: Rollout, p_mask_prompt: float, generator: torch.Generator) -> Noise:
    """Mask each real prompt token with probability `p_mask_prompt`."""
    device = rollout.prompt_ids.device
    uniform = torch.rand(rollout.prompt_ids.shape, generator=generator, device=device)
    return Noise((uniform < p_mask_prompt) & rollout.prompt_mask)


def exact(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """log p(o_k | q, o_<k) of an autoregressive policy, (B, L)."""
    return clean_text(policy, rollout, noise)


def clean_text(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """Score the completion with the completion itself as input, (B, L)."""
    return _score(policy, rollout, rollout.prompt_ids, rollout.completion_ids)


def one_step(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """log p(o_k | q', M^L), (B, L)."""
    prompt = torch.where(noise.prompt_masked, policy.mask_token_id, rollout.prompt_ids)
    blank = torch.full_like(rollout.completion_ids, policy.mask_token_id)
    return _score(policy, rollout, prompt, blank)


ESTIMATORS: dict[str, tuple[str, Callable[[Policy, Rollout, Noise], Tensor]]] = {
    "exact": ("ar", exact),
    "ar_style": ("mdm", clean_text),
    "one_step": ("mdm", one_step),
}


def estimator(name: str, policy: Policy) -> Callable[[Policy, Rollout, Noise], Tensor]:
    """The estimator called `name`, refused for a family it says nothing about."""
    if name not in ESTIMATORS:
        raise unknown("logp_estimator", name, ESTIMATORS)
    kind, function = ESTIMATORS[name]
    fitting = [n for n, (k, _) in ESTIMATORS.items() if k == policy.kind]
    require(
        kind == policy.kind,
        f"logp_estimator={name!r} is for policies of kind {kind!r}, this one is "
        f"{policy.kind!r}: expected {' or '.join(map(repr, fitting))}",
    )
    return function


def _score(policy: Policy, rollout: Rollout, prompt: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities of the rollout's tokens given `prompt` and `completion` as input, (B, L).

    The attention mask is the sampler's: prompt padding hidden, the whole completion visible.
    """
    mask = rollout.completion_mask
    attention = torch.cat([rollout.prompt_mask, torch.ones_like(mask)], 1)
    hidden = policy.forward(torch.cat([prompt, completion], 1), attention)
    logits = policy.head(hidden[:, prompt.shape[1] :][mask])  # (N, V), N tokens in the mask
    logits = logits / (rollout.temperature or 1.0)
    tokens = rollout.completion_ids[mask]
    logps = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
    return torch.zeros(mask.shape, device=logps.device).masked_scatter(mask, logps)
