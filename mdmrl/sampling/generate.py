"""The two entries to every sampler, used by training, evaluation and notebooks alike."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Generator

from mdmrl.config import require, resolve
from mdmrl.policies import MaskedDiffusionPolicy, Policy, Prompt, require_texts
from mdmrl.runs import generator_for
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.denoise import denoise
from mdmrl.sampling.output import SamplerOutput


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplerConfig | None = None,
    generator: Generator | None = None,
    record: bool = False,
) -> SamplerOutput:
    """Complete `prompts` (strings or message lists) with the sampler of the policy's family.

    Args:
        generator: on the policy's device; without one, the generator of seed 0, so that the same
            call gives the same texts.
        record: keep the denoising trajectory (not autoregressive).

    Raises:
        InputError: an option that the family cannot have, or a prompt that leaves no room.

    >>> policy = load_policy("tiny-mdm")
    >>> generate(policy, ["A patient has ..."], SamplerConfig(steps=64)).completions
    """
    generator = generator or generator_for(0, "generate", device=policy.device)
    sample = resolve(type(policy).sampler)
    with policy.lock:
        return sample(policy, prompts, config or SamplerConfig(), generator, record)


def infill(
    policy: MaskedDiffusionPolicy,
    texts: Sequence[str],
    config: SamplerConfig | None = None,
    generator: Generator | None = None,
    record: bool = False,
) -> SamplerOutput:
    """Fill in the mask tokens of `texts`, wherever they stand; one mask token is one token.

    Of `config`, `steps` None means half of the most mask tokens of a text, which `max_new_tokens`
    is. An end token in a text ends nothing. The output has no prompt: its completions are the whole
    texts.

    Raises:
        InputError: a policy that does not see both sides, no text or one without a mask token, or
            blocks, a cache, `cfg_scale` or another `max_new_tokens`.

    >>> policy = load_policy("tiny-mdm")
    >>> infill(policy, ["The answer is <|mask|><|mask|>."]).completions
    """
    config = config or SamplerConfig()
    generator = generator or generator_for(0, "infill", device=policy.device)
    require(
        policy.denoises and policy.block_length is None,
        f"a policy of kind {policy.kind!r} cannot fill in: it does not see what follows a gap; "
        "expected a masked diffusion policy",
    )
    require(
        config.block_length is None and config.cache is None and not config.cfg_scale,
        f"block_length={config.block_length}, cache={config.cache}, cfg_scale={config.cfg_scale}: "
        "gaps have no order of blocks and no prompt; leave these out",
    )
    require_texts(texts, "texts")
    for index, text in enumerate(texts):
        mask = policy.tokenizer.mask_token
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
    masks = int(open_.sum(1).max())
    require(
        config.max_new_tokens in (SamplerConfig.max_new_tokens, masks),
        f"max_new_tokens={config.max_new_tokens}: a text of {masks} mask tokens gets as many; "
        "leave it out",
    )
    config = config.replace(max_new_tokens=masks, stop_at_end=False)
    with policy.lock:
        output = denoise(policy, canvas, attention, open_, 1, config, generator, record)
    output.completion_mask = encoded.attention_mask
    output.completions = policy.decode(output.completion_ids, encoded.attention_mask)
    return output
