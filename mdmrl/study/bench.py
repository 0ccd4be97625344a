"""Timings, on the machine at hand and with its name; never asserted in tests."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mdmrl.policies import load_policy
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import train_grpo
from mdmrl.runs import environment, read_rows
from mdmrl.tasks import load_task


def bench_update(policy: str = "tiny-mdm", repeats: int = 5) -> dict:
    """Seconds of one GRPO update: 2 prompts of 6 completions, 128 new tokens, 64 steps.

    Returns:
        medians over `repeats` updates, after one to warm up, of the whole update and of its
        rollout and reward parts; and the machine.
    """
    task, loaded = load_task("medcot"), load_policy(policy)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=f"{folder}/run",
            max_steps=repeats + 1,
            steps=64,
            logp_estimator="exact" if loaded.kind == "ar" else "one_step",
            save_steps=repeats + 2,
        )
        run = train_grpo(loaded, task.rewards, task.rows("rl"), config)
        rows = [row for row in read_rows(run / "metrics.jsonl") if 0 < row["step"] <= repeats]
    columns = ("step_time", "rollout_time", "reward_time")
    medians = {name: statistics.median(row[name] for row in rows) for name in columns}
    return {"policy": policy, "repeats": repeats, **medians, **environment()}


def bench_import(repeats: int = 7) -> dict:
    """Seconds of `import mdmrl` in a fresh interpreter, beyond those of an empty one; medians."""

    def seconds(statement: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=Path(__file__).parents[2])
        return time.perf_counter() - start

    empty, ours = (
        statistics.median(seconds(statement) for _ in range(repeats))
        for statement in ("pass", "import mdmrl")
    )
    return {"import_time": ours - empty, "repeats": repeats, **environment()}
