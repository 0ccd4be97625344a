"""What completions look like, whatever the task."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdmrl.policies import Policy
from mdmrl.rewards.text import repetition
from mdmrl.sampling import SamplerOutput
from mdmrl.tasks.base import MASKED


def completion_metrics(
    policy: Policy, output: SamplerOutput, watch: Callable | None = None
) -> dict[str, float]:
    """Length, truncation, repetition, entropy and leftover masks of a batch, and what `watch` says.

    `entropy` is the mean of -log p of the tokens when they were drawn, in nats a token: unbiased
    for the sampler's entropy at temperature 1.

    Args:
        watch: see `Task`.
    """
    ids, mask = output.completion_ids, output.completion_mask
    lengths = mask.sum(1).float()
    ended = torch.isin(ids, ids.new_tensor(policy.end_token_ids)).any(1)
    left = policy.tokenizer.mask_token_id
    written = [[MASKED if i == left else i for i in row] for row in output.token_lists()]
    watched = watch(output.completions, written) if watch is not None else {}
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        **{name: float(value) for name, value in watched.items()},
        "repetition": sum(map(repetition, written)) / len(written),
        "entropy": -(output.logprobs * mask).sum().item() / lengths.sum().item(),
    }
    if policy.denoises:
        leftover = ((ids == policy.mask_token_id) & mask).any(1)
        metrics["leftover_mask_rate"] = leftover.float().mean().item()
    return metrics
