"""The two entries to every sampler, used by training, evaluation and notebooks alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import (
    MaskedDiffusionPolicy,
    Policy,
    Prompt,
    Prompts,
    refuse_bare_string,
)
from mdmrl.runs import generator_for
from mdmrl.sampling.autoregressive import sample_autoregressive
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.denoise import denoise
from mdmrl.sampling.output import SamplerOutput


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
        record: keep the denoising trajectory (not autoregressive).

    Raises:
        ValueError: an option that the family cannot have, or a prompt that leaves no room.

    >>> policy = load_policy("tiny-mdm")
    >>> generate(policy, ["A patient has ..."], SamplerConfig(steps=64)).completions
    """
    config = config or SamplerConfig()
    generator = generator or generator_for(0, "generate", device=policy.device)
    if policy.kind == "ar":
        config.refuse_denoising_options()
        require(not record, "record=True: an autoregressive policy has no denoising trajectory")
        encoded = policy.encode(prompts, config.max_new_tokens)
        return sample_autoregressive(policy, encoded, config, generator)
    if policy.kind == "bd":
        config = in_blocks_of(policy, config)
    encoded = policy.encode(prompts, config.max_new_tokens)
    canvas, attention, open_ = blank_canvas(policy, encoded, config.max_new_tokens)
    width = encoded.input_ids.shape[1]
    return denoise(policy, canvas, attention, open_, width, config, generator, record)


def blank_canvas(
    policy: MaskedDiffusionPolicy, prompts: Prompts, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (B, P) with `length` masks behind them: ids, real tokens and masks, (B, P+L) each."""
    real = prompts.attention_mask
    blank = prompts.input_ids.new_full((len(real), length), policy.mask_token_id)
    new = torch.ones_like(blank, dtype=torch.bool)
    canvas = torch.cat([prompts.input_ids, blank], 1)
    return canvas, torch.cat([real, new], 1), torch.cat([torch.zeros_like(real), new], 1)


def infill(
    policy: MaskedDiffusionPolicy,
    texts: Sequence[str],
    config: SamplerConfig | None = None,
    generator: torch.Generator | None = None,
    record: bool = False,
) -> SamplerOutput:
    """Fill in the mask tokens of `texts`, wherever they stand; one mask token is one token.

    Of `config`, `max_new_tokens` and `stop_at_end` go unused (an end token in a text ends nothing)
    and `steps` None means half of the most mask tokens of a text. The output has no prompt: its
    completions are the whole texts.

    Raises:
        ValueError: a policy that does not see both sides, no text or one without a mask token, or
            blocks, a cache or guidance.

    >>> policy = load_policy("tiny-mdm")
    >>> infill(policy, ["The answer is <|mask|><|mask|>."]).completions
    """
    config = config or SamplerConfig()
    generator = generator or generator_for(0, "infill", device=policy.device)
    require(
        policy.kind == "mdm",
        f"a policy of kind {policy.kind!r} cannot fill in: it does not see what follows a gap; "
        "expected a masked diffusion policy",
    )
    require(
        config.block_length is None and config.cache is None and not config.cfg_scale,
        f"block_length={config.block_length}, cache={config.cache}, cfg_scale={config.cfg_scale}: "
        "gaps have no order of blocks and no prompt; leave these out",
    )
    refuse_bare_string(texts)
    require(len(texts) > 0, "no texts given: expected at least one")
    mask = policy.tokenizer.mask_token
    for index, text in enumerate(texts):
        require(mask in text, f"text {index} has no {mask} to fill in: {text!r}")
    encoded = policy.encode_texts(texts)
    # One padding column in front stands for the prompt, so that every token has a left neighbour.
    canvas = F.pad(encoded.input_ids, (1, 0), value=policy.pad_token_id)
    attention = F.pad(encoded.attention_mask, (1, 0))
    open_ = canvas == policy.mask_token_id
    first = open_[:, 1:] & (encoded.attention_mask.cumsum(1) == 1)
    require(
        not (policy.logit_shift and first.any()),
        "a text starts with a mask token, and this policy predicts every token from the one before",
    )
    config = config.replace(max_new_tokens=int(open_.sum(1).max()), stop_at_end=False)
    output = denoise(policy, canvas, attention, open_, 1, config, generator, record)
    output.completion_mask = encoded.attention_mask
    output.completions = policy.decode(output.completion_ids, encoded.attention_mask)
    return output


def in_blocks_of(policy, config: SamplerConfig) -> SamplerConfig:
    """`config` with the blocks that a block diffusion policy was trained with."""
    own = policy.block_length
    require(
        config.block_length in (None, own),
        f"block_length={config.block_length}: this policy was trained with blocks of {own}",
    )
    require(
        config.cache is None,
        f"cache={config.cache!r}: a block-causal policy keeps an exact cache of its own; leave it "
        "out",
    )
    return config.replace(block_length=own)
