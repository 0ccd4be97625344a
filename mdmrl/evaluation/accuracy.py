"""Rewards and the true metric on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mdmrl.evaluation.completions import completion_metrics
from mdmrl.policies import Policy
from mdmrl.rewards.score import reward_name, score
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate


def evaluate(
    policy: Policy,
    rows: Sequence[dict],
    config: SamplerConfig,
    rewards: Sequence[Callable] = (),
    metric: Callable[[str, dict], bool] | None = None,
    prefix: str = "",
    batch_size: int = 64,
    seed: int = 0,
    draw: Callable = generate,
) -> dict[str, float]:
    """Complete every row's prompt and average what `rewards` and `metric` say.

    Args:
        draw: what completes the prompts, called as `generate` is.
    Returns:
        `reward`, `rewards/<name>/mean`, `accuracy` (the share of rows `metric` accepts) and the
        monitors of `mdmrl.evaluation.completions`, each behind `prefix`.
    """
    totals: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [row["prompt"] for row in part]
        generator = generator_for(seed, "evaluate", index=start, device=policy.device)
        output = draw(policy, prompts, config, generator)
        found = completion_metrics(policy, output)
        if rewards:
            values = score(rewards, prompts, output.completions, output.token_lists(), part)
            found["reward"] = values.sum(1).nanmean().item()
            for reward, value in zip(rewards, values.nanmean(0).tolist(), strict=True):
                found[f"rewards/{reward_name(reward)}/mean"] = value
        if metric is not None:
            right = [metric(text, row) for text, row in zip(output.completions, part, strict=True)]
            found["accuracy"] = sum(right) / len(right)
        for name, value in found.items():
            totals[prefix + name] = totals.get(prefix + name, 0.0) + value * len(part) / len(rows)
    return totals
