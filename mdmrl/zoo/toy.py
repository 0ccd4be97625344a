"""A random policy small enough that all its texts can be enumerated."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdmrl.policies import Policy
from mdmrl.runs import generator_for
from mdmrl.zoo.pretrain import PretrainConfig, make_policy


def toy_policy(letters: str, family: str = "mdm", seed: int = 0, block_length: int = 1) -> Policy:
    """A random policy over `letters`, the end token and [MASK]: its conditionals agree on nothing.

    No chat template: a prompt is a string of letters.
    """
    vocabulary = {token: i for i, token in enumerate([*letters, "<|end|>", "<|mask|>"])}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", mask_token="<|mask|>"
    )
    config = PretrainConfig(
        family=family,
        seed=seed,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        canvas=block_length,
        block_length=block_length,
    )
    policy = make_policy(config, tokenizer)
    generator = generator_for(seed, "toy")
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return policy
