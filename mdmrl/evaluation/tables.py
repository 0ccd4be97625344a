"""Evaluation of a policy as a table, one row a number of denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from mdmrl.evaluation.accuracy import evaluate
from mdmrl.evaluation.stats import wilson_interval
from mdmrl.policies import load_policy
from mdmrl.runs import write_atomically
from mdmrl.sampling import SamplerConfig
from mdmrl.tasks import load_task

SHOWN = (
    "sampler",
    "steps",
    "temperature",
    "accuracy",
    "low",
    "high",
    "reward",
    "format_rate",
    "entropy",
)


def evaluation_table(
    policy: str,
    task: str,
    split: str,
    limit: int,
    sampler: SamplerConfig,
    steps: Sequence[int | None],
) -> pd.DataFrame:
    """Accuracy with its 95 % Wilson interval (`low`, `high`), rewards and monitors.

    One row a number of denoising `steps`, with the other settings of `sampler`; column `sampler`
    names those that are not the defaults. An autoregressive policy has no denoising steps: for
    it, `[None]`.
    """
    loaded, judged = load_policy(policy), load_task(task)
    rows = judged.rows(split, limit)
    table = []
    for count in steps:
        config = sampler.replace(steps=count)
        found = evaluate(loaded, rows, config, judged.rewards, judged.metric)
        right = round(found["accuracy"] * len(rows))
        interval = wilson_interval(right, len(rows))
        asked = {
            "policy": policy,
            "kind": loaded.kind,
            "task": task,
            "split": split,
            "prompts": len(rows),
        }
        other = config.described(but=("steps", "temperature"))
        passes = config.denoising_steps if loaded.denoises else config.max_new_tokens
        drawn = {"sampler": other, "steps": passes}
        drawn |= {"temperature": config.temperature, "low": interval.low}
        table.append(asked | drawn | {"high": interval.high} | found)
    return pd.DataFrame(table)


def print_table(frame: pd.DataFrame) -> None:
    """The columns that matter most, on the terminal."""
    first = frame.iloc[0]
    title = f"{first.policy} on {first.prompts} prompts of {first.task}/{first.split}"
    table = Table(*SHOWN, title=title, title_justify="left")
    for row in frame[list(SHOWN)].itertuples(index=False):
        table.add_row(*(v if isinstance(v, str) else f"{v:.3g}" for v in row))
    Console().print(table)


def append_rows(frame: pd.DataFrame, path: str | Path) -> None:
    """Add rows to a CSV, made if missing; families differ in their columns."""
    path = Path(path)
    rows = pd.concat([pd.read_csv(path), frame]) if path.exists() else frame
    write_atomically(path, rows.to_csv(index=False, float_format="%.6g"))


def models_markdown(path: str | Path) -> str:
    """The README's table of the tiny models, from the CSV that `mdmrl eval --csv` appends to."""
    frame = pd.read_csv(path, keep_default_na=False)
    lines = [
        "| model | sampler | steps | temperature | exact answer | reward | all four tags |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {row.policy} | {row.sampler or 'default'} | {row.steps if row.kind != 'ar' else '-'} "
        f"| {row.temperature:g} | {row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}] "
        f"| {row.reward:.2f} | {row.format_rate:.0%} |"
        for row in frame.itertuples()
    ]
    return "\n".join(lines)
