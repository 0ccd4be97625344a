"""Rewards and the true metric on held-out prompts."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from mdmrl.config import require, require_function
from mdmrl.policies import Policy
from mdmrl.rewards import RewardLog, check_rewards, complete_rows, reward_values, total_reward
from mdmrl.rewards.protocol import plain, require_prompts
from mdmrl.rewards.text import repetition
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, SamplerOutput, generate
from mdmrl.sampling.output import checked
from mdmrl.tasks.base import MASKED, verdicts

# What functions of the user's are called with; `draw` in training with `record` too.
ARGUMENTS = {
    "metric": ("completion", "row"),
    "watch": ("texts", "token_ids"),
    "probe": ("policy",),
    "draw": ("policy", "prompts", "config", "generator"),
}


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
        rewards report and `completion_metrics`, each behind `prefix`. What all rewards, one reward
        or the metric abstain from is not in its mean, and a mean of none is None.
    """
    require(batch_size >= 1, f"batch_size={batch_size}: expected 1 or more")
    log = log or RewardLog()
    judge = Judge(policy, rows, config, rewards, metric, draw, watch, reward_weights)
    means: dict[str, list[Mean]] = defaultdict(list)
    for start in range(0, len(rows), batch_size):
        found = judge(start, batch_size, seed, log).means()
        log.beside(found)  # a name that is taken is found at once
        for name, mean in found.items():
            means[name].append(mean)
    averages = {name: average(batches) for name, batches in means.items()}
    return {prefix + name: value for name, value in log.beside(averages).items()}


Mean = tuple[float, int]  # of a batch, over how many


def average(batches: Sequence[Mean]) -> float | None:
    """The mean over batches of what counts in each; None where nothing does."""
    counting = [(mean, count) for mean, count in batches if count and not math.isnan(mean)]
    total = sum(count for _, count in counting)
    return sum(mean * count / total for mean, count in counting) if total else None


@dataclass
class Batch:
    """B completions and what is said of them.

    Attributes:
        rows: whose prompts were completed; seconds: what completing them took.
        columns: `reward`, `rewards/<name>/mean` and `accuracy` of each, (B,) float64, NaN where
            who judges abstains; monitors: of the batch as a whole.
    """

    rows: Sequence[dict]
    output: SamplerOutput
    seconds: float
    columns: dict[str, Tensor]
    monitors: dict[str, float]

    def means(self) -> dict[str, Mean]:
        """Of the monitors, then of the columns, each over what counts."""
        of_all = {name: (value, len(self.rows)) for name, value in self.monitors.items()}
        counts = {name: int((~column.isnan()).sum()) for name, column in self.columns.items()}
        return of_all | {k: (v.nanmean().item(), counts[k]) for k, v in self.columns.items()}


@dataclass
class Judge:
    """Completes a batch of `rows` and judges it; for the arguments see `evaluate`."""

    policy: Policy
    rows: Sequence[dict]
    config: SamplerConfig
    rewards: Sequence[Callable]
    metric: Callable[[str, dict], bool | None] | None
    draw: Callable
    watch: Callable | None
    reward_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require_prompts(self.rows)
        given = {"metric": self.metric, "draw": self.draw, "watch": self.watch}
        for name, part in given.items():
            if part is not None:
                require_function(part, name, ARGUMENTS[name])
        if self.rewards:
            self.rows = complete_rows(self.rows)
            self.names = check_rewards(self.rewards, self.reward_weights, self.rows)

    def __call__(self, start: int, size: int, seed: int, log: RewardLog) -> Batch:
        """The batch of the rows from `start` on, drawn with a generator of (seed, start)."""
        rows = self.rows[start : start + size]
        prompts = [row["prompt"] for row in rows]
        generator = generator_for(seed, "evaluate", index=start, device=self.policy.device)
        began = time.perf_counter()
        output = checked(self.draw(self.policy, prompts, self.config, generator), len(rows))
        seconds = time.perf_counter() - began
        written, columns = output.completions, {}
        if self.rewards:
            given = (prompts, written, output.token_lists(), rows)
            values = reward_values(self.rewards, *given, **log.offered)
            each = zip(self.names, values.T, strict=True)
            columns = {"reward": total_reward(values, self.reward_weights)}
            columns |= {f"rewards/{name}/mean": column for name, column in each}
        if self.metric is not None:
            said = verdicts(self.metric, written, rows)
            right = [math.nan if verdict is None else verdict for verdict in said]
            columns["accuracy"] = torch.tensor(right, dtype=torch.float64)
        monitors = completion_metrics(self.policy, output, self.watch)
        return Batch(rows, output, seconds, columns, monitors)


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
    watched = numbers(watch, output.completions, written) if watch is not None else {}
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        **watched,
        "repetition": sum(map(repetition, written)) / len(written),
        "entropy": -(output.logprobs * mask).sum().item() / lengths.sum().item(),
    }
    if policy.denoises:
        leftover = ((ids == policy.mask_token_id) & mask).any(1)
        metrics["leftover_mask_rate"] = leftover.float().mean().item()
    return metrics


def numbers(function: Callable, *given) -> dict[str, float | None]:
    """What a function of the user's measures of what it is `given`; an InputError for anything but
    numbers by name."""
    found, name = function(*given), getattr(function, "__name__", type(function).__name__)
    require(isinstance(found, Mapping), f"{name} returned {found!r:.80}: expected numbers by name")
    measured = {str(key): plain(value) for key, value in found.items()}
    for key, value in measured.items():
        said = f"{name} returned {key}={value!r:.80}: expected a number"
        require(value is None or isinstance(value, Real), said)
    return {key: value if value is None else float(value) for key, value in measured.items()}
