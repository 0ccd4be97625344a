"""What `mdmrl eval` does: evaluate a policy, score stored generations, or compare two
evaluations."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from mdmrl.config import require
from mdmrl.evaluation.examples import evaluate_examples, evaluation_identity, summary
from mdmrl.evaluation.generations import compare, score_generations
from mdmrl.evaluation.stats import Interval
from mdmrl.evaluation.tables import (
    append_rows,
    print_table,
    rows_before,
    samplers_of,
    table_row,
)
from mdmrl.identity import described, digest
from mdmrl.policies import Policy
from mdmrl.provenance import environment
from mdmrl.runs import as_json, write_atomically
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.tasks import Task

FOLDER = Path("runs") / "eval"


def evaluate_policy(
    name: str,
    policy: Policy,
    task: Task,
    split: str,
    limit: int,
    given: dict,
    steps: Sequence[int] = (),
    ks: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    samples: int = 1,
    rewards: Sequence[Callable] | None = None,
    draw: Callable = generate,
    batch_size: int = 64,
    output_dir: Path | None = None,
    csv: Path | None = None,
    json: Path | None = None,
) -> None:
    """Evaluate with the task's sampler and the fields `given`, once for each of `steps`; print the
    table, and write what is asked for, and `summary.json` into the run folder. Of several numbers
    of steps each has a folder in `output_dir`, and `json` is a list."""
    rows, table, reports = task.rows(split, limit), [], []
    how = {"seeds": seeds, "samples": samples, "batch_size": batch_size, "draw": draw}
    how |= {"rewards": task.rewards if rewards is None else rewards}
    drawn = samples * len(seeds)
    for k in ks:
        require(1 <= k <= drawn, f"k={k}: expected 1 to {drawn}, the completions of a prompt")
    ks = ks or ([1, drawn] if samples > 1 else [])
    if csv is not None and csv.exists():
        rows_before(csv)  # which has to be one
    asked = SamplerConfig.from_dict(task.sampler_for(policy, **given))
    for sampler in samplers_of(policy, asked, steps):
        if output_dir is None:
            known = digest(described(evaluation_identity(policy, task, rows, sampler, **how)))
            words = f"{Path(name).name} {task.name} {sampler.described()}"
            folder = FOLDER / (re.sub(r"[^\w.=-]+", "-", words)[:80] + f"-{known}")
        else:
            folder = output_dir / f"steps-{sampler.steps}" if len(steps) > 1 else output_dir
        found = evaluate_examples(
            policy, task, rows, sampler, output_dir=folder, progress=True, **how
        )
        table.append(table_row(name, policy, task, split, sampler, found))
        report = (
            summary(found.examples, ks)
            | {name: found.examples[name].sum() for name in ("seconds", "positions")}
            | {"nfe": int(found.examples.groupby("batch").nfe.first().sum())}
            | {"policy": name, "kind": policy.kind, "task": task.name, "split": split}
            | {"sampler": sampler.to_dict(), "samples": samples, "folder": str(folder)}
            | {"averages": found.averages}
            | {"environment": environment(policy.device)}
        )
        _write(folder / "summary.json", report)
        reports.append(report)
    frame = pd.DataFrame(table)
    if csv is not None:
        append_rows(frame, csv)
    # First, since printing ends where a pipe was closed.
    _write(json, reports if len(reports) > 1 else reports[0])
    print_table(frame)
    for report in reports:
        for k, chance in report.get("pass@k", {}).items():
            print(f"pass@{k} {_said(chance['estimate'], chance['interval'])}")
        print(f"{_counts(report)}: {report['folder']}")


def evaluate_generations(
    task: Task, paths: Sequence[Path], output_dir: Path | None = None, json: Path | None = None
) -> None:
    """Score stored generations; print the accuracy, write it to `json` and what was made of each
    into `output_dir`."""
    examples = score_generations(task, paths)
    if output_dir is not None:
        lines = [as_json(row) + "\n" for row in examples.to_dict("records")]
        write_atomically(output_dir / "examples.jsonl", "".join(lines))
    found = summary(examples)
    found |= {"prompts": int(examples.prompt_hash.nunique()), "task": task.name}
    found |= {"files": list(map(str, paths)), "environment": environment("cpu")}
    _write(json, found)
    print(f"{task.name}: accuracy {_said(found['accuracy'], found['interval'])}, {_counts(found)}")


def compare_evaluations(a: Path, b: Path, json: Path | None = None) -> None:
    """Compare two evaluations; print what was found and write it to `json`."""
    found = compare(a, b)
    _write(json, found)
    one, other = found["a"]["accuracy"], found["b"]["accuracy"]
    print(f"{found['n']} items: {one:.3g} in A ({a}), {other:.3g} in B ({b})")
    print(f"B - A: {_said(found['difference'], found['interval'])}")
    print(
        f"right in both {found['both']}, in A alone {found['only_a']}, in B alone "
        f"{found['only_b']}, in neither {found['neither']}; McNemar's exact p = {found['p']:.3g}"
    )


def _write(path: Path | None, report) -> None:
    if path is not None:
        write_atomically(path, as_json(report, indent=1) + "\n")


def _said(estimate: float | None, ends: Sequence[float] | None) -> str:
    return "unknown" if estimate is None else str(Interval(estimate, *ends))


def _counts(report: dict) -> str:
    more = f", {report['completions']} completions" * (report["completions"] > report["n"])
    more += f", {report['left_out']} not judged" * (report["left_out"] > 0)
    return f"{report['n']} items{more}"
