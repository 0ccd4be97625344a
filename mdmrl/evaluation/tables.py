"""Evaluation of a policy as a table, one row a number of denoising steps."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from mdmrl.config import InputError, require
from mdmrl.evaluation.examples import Evaluation, summary
from mdmrl.policies import Policy
from mdmrl.runs import write_atomically
from mdmrl.sampling import SamplerConfig
from mdmrl.tasks import Task

FIRST = ("steps", "accuracy", "low", "high", "reward")
TITLE = ("policy", "kind", "task", "split", "prompts", "sampler", "temperature")
ASIDE = ("repetition", "leftover_mask_rate")


def samplers_of(
    policy: Policy, sampler: SamplerConfig, steps: Sequence[int]
) -> list[SamplerConfig]:
    """The sampler with each number of `steps`, or as it is where there are none."""
    require(
        policy.denoises or not steps,
        f"steps={list(steps)}: an autoregressive policy has no denoising steps; leave them out",
    )
    return [sampler.replace(steps=count) for count in steps] or [sampler]


def table_row(
    name: str, policy: Policy, task: Task, split: str, sampler: SamplerConfig, found: Evaluation
) -> dict:
    """Accuracy with its 95 % interval (`low`, `high`), rewards and monitors, and what was asked:
    `sampler` names the settings that are not the defaults."""
    count = sampler.denoising_steps if policy.denoises else sampler.max_new_tokens
    row = {"policy": name, "kind": policy.kind, "task": task.name, "split": split}
    row |= {"prompts": int(found.examples["index"].nunique())}
    row |= {"sampler": sampler.described(but=("steps", "temperature"))}
    row |= {"steps": count, "temperature": sampler.temperature}
    interval = summary(found.examples)["interval"]
    if interval is not None:
        row |= dict(zip(("low", "high"), interval, strict=True))
    return row | found.averages


def print_table(frame: pd.DataFrame) -> None:
    """The columns that matter most, and what the task watches, on the terminal."""
    first = frame.iloc[0]
    where = f"{first.policy} on {first.prompts} prompts of {first.task}/{first.split}"
    sampled = f"temperature={first.temperature:g} {first.sampler}"
    more = [n for n in frame if n not in (*FIRST, *TITLE, *ASIDE) and "/" not in n]
    shown = [name for name in (*FIRST, *more) if name in frame]
    table = Table(*shown, box=box.SIMPLE, collapse_padding=True)
    for row in frame[shown].itertuples(index=False):
        table.add_row(*("-" if pd.isna(value) else f"{value:.3g}" for value in row))
    Console().print(f"{where}, {sampled}", table)


def rows_before(path: Path) -> pd.DataFrame:
    """The rows of a CSV that is to be appended to."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        said = f"{path} is no CSV to append to ({str(error).strip()})"
        raise InputError(f"{said}: move it away, or name another file") from None


def append_rows(frame: pd.DataFrame, path: str | Path) -> None:
    """Add rows to a CSV, made if missing; families differ in their columns."""
    path = Path(path)
    rows = pd.concat([rows_before(path), frame]) if path.exists() else frame
    write_atomically(path, rows.to_csv(index=False, float_format="%.6g"))


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, without a newline at its end."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MODELS = ("model", "task", "items", "sampler", "steps", "temperature", "exact answer", "reward")
MODELS += ("all four tags",)


def models_markdown(path: str | Path) -> str:
    """The table of the tiny models, from the CSV that `mdmrl eval --csv` appends to."""
    rows = []
    for row in pd.read_csv(path).itertuples():
        sampler = "default" if pd.isna(row.sampler) else row.sampler
        steps = "-" if row.kind == "ar" else f"{row.steps}"
        tags = "-" if pd.isna(row.format_rate) else f"{row.format_rate:.0%}"
        right = f"{row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
        drawn = f"{row.prompts}", sampler, steps, f"{row.temperature:g}"
        rows.append((row.policy, row.task, *drawn, right, f"{row.reward:.2f}", tags))
    return markdown_table(MODELS, rows)
