"""Rewards and the true metric on held-out prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from mdmrl.evaluation.completions import completion_metrics
from mdmrl.policies import Policy
from mdmrl.rewards import RewardLog, check_rewards, complete_rows, reward_values, total_reward
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate


def evaluate(
    policy: Policy,
    rows: Sequence[dict],
    config: SamplerConfig,
    rewards: Sequence[Callable] = (),
    metric: Callable[[str, dict], bool | None] | None = None,
    prefix: str = "",
    batch_size: int = 64,
    seed: int = 0,
    draw: Callable = generate,
    watch: Callable | None = None,
    reward_weights: Sequence[float] | None = None,
    log: RewardLog | None = None,
) -> dict[str, float | None]:
    """Complete every row's prompt and average what `rewards` and `metric` say.

    Args:
        draw: what completes the prompts, called as `generate` is; watch: see `Task`.
        reward_weights: of the rewards in their sum; log: takes down what they report.
    Returns:
        `reward`, `rewards/<name>/mean`, `accuracy` (the share of rows `metric` accepts), what
        rewards report and the monitors of `mdmrl.evaluation.completions`, each behind `prefix`.
        Completions that all rewards, one reward or the metric abstain from are not in its mean,
        and a mean of none is None.
    """
    log = log or RewardLog()
    if rewards:
        rows = complete_rows(rows)
        names = check_rewards(rewards, reward_weights, rows)
    means: dict[str, list[tuple[float, int]]] = defaultdict(list)  # of each batch, over how many
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [row["prompt"] for row in part]
        generator = generator_for(seed, "evaluate", index=start, device=policy.device)
        output = draw(policy, prompts, config, generator)
        for name, value in completion_metrics(policy, output, watch).items():
            means[name].append((value, len(part)))
        written, columns = output.completions, {}
        if rewards:
            given = (prompts, written, output.token_lists(), part)
            values = reward_values(rewards, *given, **log.offered)
            columns = {f"rewards/{name}/mean": x for name, x in zip(names, values.T, strict=True)}
            columns = {"reward": total_reward(values, reward_weights), **columns}
        if metric is not None:
            verdicts = map(metric, written, part)
            right = [math.nan if verdict is None else verdict for verdict in verdicts]
            columns["accuracy"] = torch.tensor(right, dtype=torch.float64)
        for name, column in columns.items():
            means[name].append((column.nanmean().item(), int((~column.isnan()).sum())))
    averages = {name: _average(batches) for name, batches in means.items()}
    return {prefix + name: value for name, value in (log.metrics() | averages).items()}


def _average(batches: Sequence[tuple[float, int]]) -> float | None:
    """The mean over batches of what counts in each; None where nothing does."""
    counting = [(mean, count) for mean, count in batches if count and not math.isnan(mean)]
    total = sum(count for _, count in counting)
    return sum(mean * count / total for mean, count in counting) if total else None
