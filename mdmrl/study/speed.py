"""How fast a sampler is, and how good what it gives: the same prompts, taken batch by batch."""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from mdmrl.evaluation.stats import Interval, t_interval, wilson_interval
from mdmrl.policies import Policy
from mdmrl.rewards import reward_values, total_reward
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.tasks import Task

WHOLE = "whole completion"


def samplers(
    length: int, steps: Sequence[int], block_length: int, thresholds: Sequence[float]
) -> dict[tuple[str, float], SamplerConfig]:
    """What `07_speed_vs_steps` compares, by name and setting (a number of steps, or a threshold):
    the whole completion, the same in blocks, blocks with either cache, parallel decoding."""
    found, base = {}, SamplerConfig(max_new_tokens=length)
    for count in steps:
        found[WHOLE, count] = base.replace(steps=count)
        if count >= length // block_length:
            blocks = base.replace(steps=count, block_length=block_length)
            found["blocks", count] = blocks
            found["blocks, prefix cache", count] = blocks.replace(cache="prefix")
            found["blocks, dual cache", count] = blocks.replace(cache="dual")
    for threshold in thresholds:
        blocks = base.replace(block_length=block_length, threshold=threshold)
        found["blocks, threshold", threshold] = blocks
        found["blocks, threshold, dual cache", threshold] = blocks.replace(cache="dual")
    return found


def block_samplers(
    length: int, steps: Sequence[int], block_length: int, thresholds: Sequence[float]
) -> dict[tuple[str, float], SamplerConfig]:
    """The same for a block diffusion policy, whose blocks and cache are its own."""
    base, name = SamplerConfig(max_new_tokens=length), "block diffusion"
    counts = [count for count in steps if count >= length // block_length]
    found = {(name, count): base.replace(steps=count) for count in counts}
    return found | {(f"{name}, threshold", t): base.replace(threshold=t) for t in thresholds}


def passes(
    samplers: dict[tuple[str, float], tuple[Policy, SamplerConfig]],
    task: Task,
    rows: Sequence[dict],
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
) -> pd.DataFrame:
    """Complete every row with every sampler (by name and setting) and seed; one line a completion.

    Samplers take turns batch by batch, so that a slow moment of the machine hits all of them.

    Returns:
        columns sampler, setting, seed, batch and prompt (their numbers), right, reward, and the
        prompt's share of its batch's seconds, nfe and token_forwards. Seconds count sampling
        alone, from texts to texts; each sampler has warmed up on one batch before.
    """
    for policy, config in samplers.values():
        generate(policy, [row["prompt"] for row in rows[:batch_size]], config)
    batches = []
    for seed in seeds:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            for (name, setting), (policy, config) in samplers.items():
                generator = generator_for(seed, "speed", index=start, device=policy.device)
                where = {"sampler": name, "setting": setting, "seed": seed}
                where |= {"batch": start // batch_size, "prompt": range(start, start + len(part))}
                found = _one_batch(policy, task, part, config, generator)
                batches.append(pd.DataFrame(where | found))
    return pd.concat(batches, ignore_index=True)


def _one_batch(policy, task, rows, config, generator) -> dict:
    prompts, clock = [row["prompt"] for row in rows], time.perf_counter()
    output = generate(policy, prompts, config, generator)
    spent = {"seconds": time.perf_counter() - clock, "nfe": output.nfe}
    spent |= {"token_forwards": output.token_forwards}
    values = reward_values(task.rewards, prompts, output.completions, output.token_lists(), rows)
    right = [bool(x) for x in map(task.metric, output.completions, rows)]
    judged = {"right": right, "reward": total_reward(values).tolist()}
    return judged | {name: whole / len(rows) for name, whole in spent.items()}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a sampler and setting: accuracy with its 95 % Wilson interval (`low`, `high`), mean
    reward, instances a second (the median over batches), and costs an instance."""
    grouped = frame.groupby(["sampler", "setting"], sort=False)
    table = grouped.agg(
        prompts=("right", "size"),
        accuracy=("right", "mean"),
        reward=("reward", "mean"),
        seconds=("seconds", "median"),
        nfe=("nfe", "mean"),
        token_forwards=("token_forwards", "mean"),
    ).reset_index()
    right = (table.accuracy * table.prompts).round().astype(int)
    intervals = [wilson_interval(k, n) for k, n in zip(right, table.prompts, strict=True)]
    table["low"] = [interval.low for interval in intervals]
    table["high"] = [interval.high for interval in intervals]
    table["instances_per_second"] = 1 / table.seconds
    return table


def log_speed_ratio(ours: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """log(instances a second of `ours`, completed whole, / of `other`), a row a batch, a column a
    setting; the same prompts are compared with each other."""
    chosen = ours[ours.sampler == WHOLE]
    seconds = chosen.groupby(["batch", "setting"]).seconds.first().unstack()
    reference = other.groupby("batch").seconds.first()
    return -np.log(seconds.div(reference, axis=0))


def log_cost_ratio(ours: pd.DataFrame, other: pd.DataFrame, cost: str) -> pd.DataFrame:
    """log of what a right completion costs `ours` over what it costs `other`, where wrong ones are
    drawn again: mean `cost` over the share that is right. One row a seed, one column a setting;
    infinite where none was right."""
    ours, other = ours.groupby(["seed", "setting"]), other.groupby("seed")
    with np.errstate(divide="ignore"):
        mine, theirs = (grouped[cost].mean() / grouped.right.mean() for grouped in (ours, other))
        return np.log(mine.unstack().div(theirs, axis=0))


def cheapest(log_cost_ratio: pd.DataFrame) -> tuple[float, Interval] | None:
    """Of the settings that gave every one of two or more seeds something right, that with the
    smallest mean log cost ratio, and its interval: of 1 - 0.05 / settings (Bonferroni), since the
    best of many is looked at. None without one."""
    usable = log_cost_ratio.loc[:, np.isfinite(log_cost_ratio).all()]
    if usable.empty or len(usable) < 2:
        return None
    best = usable.mean().idxmin()
    return best, t_interval(usable[best], 1 - 0.05 / log_cost_ratio.shape[1])
