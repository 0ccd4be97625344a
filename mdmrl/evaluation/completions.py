"""What completions look like: the symptoms that the thesis's appendix C reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdmrl.policies import Policy
from mdmrl.rewards.text import TAGS
from mdmrl.sampling import SamplerOutput

NGRAM = 4
REPETITIVE = 0.2


def format_rate(texts: Sequence[str]) -> float:
    """Share of texts with all four tags."""
    return sum(all(tag in text for tag in TAGS) for text in texts) / len(texts)


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same sequence; 0 below four tokens."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def fails(text: str, ids: Sequence[int], mask_token_id: int | None) -> bool:
    """Whether a completion shows one of appendix C's failures: it lacks a tag, keeps a [MASK], or
    more than `REPETITIVE` of its 4-grams are repeats."""
    lacks_tag = not all(tag in text for tag in TAGS)
    return lacks_tag or mask_token_id in ids or repetition(ids) > REPETITIVE


def completion_metrics(policy: Policy, output: SamplerOutput) -> dict[str, float]:
    """Length, truncation, format, leftover masks, repetition and entropy of a batch.

    `entropy` is the mean of -log p of the tokens when they were drawn, in nats a token: unbiased
    for the sampler's entropy at temperature 1.
    """
    ids, mask = output.completion_ids, output.completion_mask
    lengths = mask.sum(1).float()
    ended = torch.isin(ids, ids.new_tensor(policy.end_token_ids)).any(1)
    written = output.token_lists()
    texts = zip(output.completions, written, strict=True)
    failures = [fails(text, row, policy.tokenizer.mask_token_id) for text, row in texts]
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        "format_rate": format_rate(output.completions),
        "failure_rate": sum(failures) / len(failures),
        "repetition": sum(map(repetition, written)) / len(written),
        "entropy": -(output.logprobs * mask).sum().item() / lengths.sum().item(),
    }
    if policy.kind == "mdm":
        leftover = ((ids == policy.mask_token_id) & mask).any(1)
        metrics["leftover_mask_rate"] = leftover.float().mean().item()
    return metrics
