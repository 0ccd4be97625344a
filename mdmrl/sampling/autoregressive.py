"""Left-to-right sampling with an exact KV cache."""

from collections.abc import Sequence

import torch
from torch import Generator
from transformers import DynamicCache

from mdmrl.config import require
from mdmrl.policies import Policy, Prompt, Prompts
from mdmrl.sampling.choose import draw_tokens
from mdmrl.sampling.config import SamplerConfig, require_config
from mdmrl.sampling.output import EXACT, SamplerOutput


def sample(
    policy: Policy, prompts: Sequence[Prompt], config: SamplerConfig, generator, record=False
) -> SamplerOutput:
    """Complete `prompts`; see `mdmrl.sampling.generate`."""
    require_config(config)
    require(not record, "record=True: an autoregressive policy has no denoising trajectory")
    config.refuse_denoising_options()
    return extend(policy, policy.encode(prompts, config.max_new_tokens), config, generator)


@torch.no_grad()
def extend(
    policy: Policy, prompts: Prompts, config: SamplerConfig, generator: Generator
) -> SamplerOutput:
    """Go on from `prompts`, a token a forward pass; ends early once every row has ended."""
    tokens, attention = prompts.input_ids, prompts.attention_mask
    completion = tokens.new_full((len(tokens), config.max_new_tokens), policy.pad_token_id)
    logprobs = torch.zeros(completion.shape, device=tokens.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    cache = DynamicCache(config=policy.model.config)
    nfe = token_forwards = 0

    for position in range(config.max_new_tokens):
        hidden = policy.hidden_states(tokens, attention, cache)[:, -1]
        nfe, token_forwards = nfe + 1, token_forwards + tokens.numel()
        drawn, logprob = draw_tokens(policy.head(hidden), config, generator)
        completion[~ended, position] = drawn[~ended]
        logprobs[~ended, position] = logprob[~ended]
        ended |= policy.is_end(drawn)
        if ended.all():
            break
        tokens = completion[:, position : position + 1]
        attention = torch.cat([attention, torch.ones_like(tokens, dtype=torch.bool)], 1)

    sequences = torch.cat([prompts.input_ids, completion], 1)
    costs = {"nfe": nfe, "token_forwards": token_forwards}
    saved = {"key-value cache": EXACT}
    return SamplerOutput.of(
        policy, sequences, prompts.attention_mask, logprobs, optimisations=saved, **costs
    )
