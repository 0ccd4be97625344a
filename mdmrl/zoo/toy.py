"""A random policy small enough that all its texts can be enumerated."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdmrl.policies import Policy
from mdmrl.policies.families import FAMILIES
from mdmrl.runs import generator_for
from mdmrl.zoo.pretrain import fresh_model


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
    shape = (32, 2, 64, 2, 2, len(tokenizer))
    model = fresh_model(family, tokenizer, shape, 512, block_length, seed)
    generator = generator_for(seed, "toy")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return FAMILIES[family](model, tokenizer)
