"""Denoising: from all [MASK] to text in `steps` forward passes (Nie et al. 2025, algorithm 5).

Exact savings over the textbook loop: the head runs only at positions still masked, and a maximum
and a logsumexp take the place of a softmax over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdmrl.policies.base import MaskedDiffusionPolicy, Prompts
from mdmrl.sampling.config import SamplerConfig, SamplerOutput, Step, draw


def reveal_quota(length: int, steps: int) -> list[int]:
    """How many of `length` positions each step reveals: even, the remainder to the first steps."""
    base, remainder = divmod(length, steps)
    return [base + (s < remainder) for s in range(steps)]


@torch.no_grad()
def denoise(
    policy: MaskedDiffusionPolicy,
    prompts: Prompts,
    config: SamplerConfig,
    generator: torch.Generator,
    record: bool = False,
) -> SamplerOutput:
    """Complete `prompts` by denoising the whole completion at once."""
    batch, width = prompts.input_ids.shape
    length, device = config.max_new_tokens, prompts.input_ids.device
    blank = torch.full((batch, length), policy.mask_token_id, device=device)
    canvas = torch.cat([prompts.input_ids, blank], 1)  # (B, P+L)
    attention = torch.cat([prompts.attention_mask, torch.ones_like(blank, dtype=torch.bool)], 1)
    completion = canvas[:, width:]  # a view
    logprobs = torch.zeros(batch, length, device=device)
    open_at = torch.arange(length, device=device).expand(batch, length)  # masked positions
    ends = torch.tensor(policy.end_token_ids, device=device)
    trajectory = []

    for quota in reveal_quota(length, config.denoising_steps):
        hidden = policy.forward(canvas, attention)[:, width:]
        hidden = hidden.gather(1, open_at[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = policy.head(hidden)  # (B, M, V) with M positions still masked
        if config.suppress_mask:
            logits[..., policy.mask_token_id] = -torch.inf
        tokens, logprob = draw(logits, config.temperature, generator)
        score = commit_score(logits, tokens, config, generator)
        if config.end_last:  # log-probabilities and uniforms alike stay far above; double, or the
            # subtraction would make ties of the end tokens' scores
            score = score.double() - 1e6 * torch.isin(logits.argmax(-1), ends)
        chosen = score.topk(quota, dim=1).indices  # (B, quota) into the masked positions
        step = Step(*(x.gather(1, chosen) for x in (open_at, tokens, logprob)))
        completion.scatter_(1, step.positions, step.tokens)
        logprobs.scatter_(1, step.positions, step.logprobs)
        keep = torch.ones_like(open_at, dtype=torch.bool).scatter_(1, chosen, False)
        open_at = open_at[keep].view(batch, -1)
        trajectory.append(step)

    mask = policy.completion_mask(completion)
    return SamplerOutput(
        sequences=canvas,
        prompt_mask=prompts.attention_mask,
        completion_ids=completion,
        completion_mask=mask,
        completions=policy.decode(completion, mask),
        logprobs=logprobs,
        nfe=config.denoising_steps,
        token_forwards=config.denoising_steps * canvas.numel(),
        trajectory=trajectory if record else None,
    )


def commit_score(
    logits: Tensor, tokens: Tensor, config: SamplerConfig, generator: torch.Generator
) -> Tensor:
    """How much a step wants to reveal each masked position, (B, M); the highest are revealed.

    `low_confidence` is LLaDA's rule: the untempered probability of the token already drawn.
    """
    if config.remasking == "random":
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
