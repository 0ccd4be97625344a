"""One entry for every sampler, used by training, evaluation and notebooks alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdmrl.policies.base import Policy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling.autoregressive import sample_autoregressive
from mdmrl.sampling.config import SamplerConfig, SamplerOutput
from mdmrl.sampling.denoise import denoise


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplerConfig | None = None,
    generator: torch.Generator | None = None,
    record: bool = False,
) -> SamplerOutput:
    """Complete `prompts` (strings or message lists) with the sampler of the policy's family.

    Args:
        generator: on the policy's device; without one, the generator of seed 0, so that the same
            call gives the same texts.
        record: keep the denoising trajectory (masked diffusion only).

    >>> policy = load_policy("tiny-mdm")
    >>> generate(policy, ["A patient has ..."], SamplerConfig(steps=64)).completions
    """
    config = config or SamplerConfig()
    generator = generator or generator_for(0, "generate", device=policy.device)
    encoded = policy.encode(prompts, config.max_new_tokens)
    if policy.kind == "ar":
        return sample_autoregressive(policy, encoded, config, generator)
    return denoise(policy, encoded, config, generator, record)
