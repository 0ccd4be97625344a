"""What completions look like: the symptoms that the thesis's appendix C reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdmrl.policies.base import Policy
from mdmrl.rewards.text import TAGS
from mdmrl.sampling import SamplerOutput

NGRAM = 4


def format_rate(texts: Sequence[str]) -> float:
    """Share of texts with all four tags."""
    return sum(all(tag in text for tag in TAGS) for text in texts) / len(texts)


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same sequence; 0 below four tokens."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def completion_metrics(policy: Policy, output: SamplerOutput) -> dict[str, float]:
    """Length, truncation, format, leftover masks, repetition and entropy of a batch.

    `entropy` is the mean of -log p of the tokens when they were drawn, in nats a token: unbiased
    for the sampler's entropy at temperature 1.
    """
    ids, mask = output.completion_ids, output.completion_mask
    lengths = mask.sum(1).float()
    ended = torch.isin(ids, ids.new_tensor(policy.end_token_ids)).any(1)
    repeated = [repetition(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        "format_rate": format_rate(output.completions),
        "repetition": sum(repeated) / len(repeated),
        "entropy": -(output.logprobs * mask).sum().item() / lengths.sum().item(),
    }
    if policy.kind == "mdm":
        leftover = ((ids == policy.mask_token_id) & mask).any(1)
        metrics["leftover_mask_rate"] = leftover.float().mean().item()
    return metrics
