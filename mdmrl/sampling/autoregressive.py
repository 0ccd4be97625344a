"""Left-to-right sampling with an exact KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from mdmrl.config import require
from mdmrl.policies import AutoregressivePolicy, Prompt, Prompts
from mdmrl.sampling.choose import draw_tokens
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.output import EXACT, SamplerOutput


def sample(
    policy: AutoregressivePolicy,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    generator: torch.Generator,
    record: bool = False,
) -> SamplerOutput:
    """Complete `prompts`; see `mdmrl.sampling.generate`."""
    require(not record, "record=True: an autoregressive policy has no denoising trajectory")
    config.refuse_denoising_options()
    return extend(policy, policy.encode(prompts, config.max_new_tokens), config, generator)


@torch.no_grad()
def extend(
    policy: AutoregressivePolicy,
    prompts: Prompts,
    config: SamplerConfig,
    generator: torch.Generator,
) -> SamplerOutput:
    """Go on from `prompts`, a token a forward pass; ends early once every row has ended."""
    batch, length = len(prompts.input_ids), config.max_new_tokens
    device = prompts.input_ids.device
    completion = torch.full((batch, length), policy.pad_token_id, device=device)
    logprobs = torch.zeros(batch, length, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    ends = torch.tensor(policy.end_token_ids, device=device)
    cache = DynamicCache(config=policy.model.config)
    attention, tokens = prompts.attention_mask, prompts.input_ids
    nfe = token_forwards = 0

    for position in range(length):
        hidden = policy.hidden_states(tokens, attention, cache)[:, -1]
        nfe, token_forwards = nfe + 1, token_forwards + tokens.numel()
        drawn, logprob = draw_tokens(policy.head(hidden), config, generator)
        completion[~ended, position] = drawn[~ended]
        logprobs[~ended, position] = logprob[~ended]
        ended |= torch.isin(drawn, ends)
        if ended.all():
            break
        tokens = completion[:, position : position + 1]
        attention = torch.cat([attention, torch.ones_like(tokens, dtype=torch.bool)], 1)

    return SamplerOutput.of(
        policy,
        torch.cat([prompts.input_ids, completion], 1),
        prompts.attention_mask,
        logprobs,
        nfe=nfe,
        token_forwards=token_forwards,
        optimisations={"key-value cache": EXACT},
    )
