"""Timings, on the machine at hand and with its name; never asserted in tests."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from mdmrl.config import require
from mdmrl.policies import Policy, load_policy
from mdmrl.provenance import environment
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.estimators import draw_noise
from mdmrl.rl.grpo import train_grpo, update
from mdmrl.rl.logprobs import estimator
from mdmrl.rl.rollout import Rollout
from mdmrl.runs import generator_for, read_rows
from mdmrl.tasks import load_task


def bench_update(
    policy: str = "tiny-mdm", repeats: int = 3, device: str = "auto", dtype: str = "float32"
) -> dict:
    """Seconds of one GRPO update, 2 prompts of 6 completions, 128 new tokens, 64 steps: medians of
    the whole and of its rollout and reward parts over `repeats`, after one to warm up."""
    require(repeats >= 1, f"repeats={repeats}: expected at least 1")
    task, loaded = load_task("medcot"), load_policy(policy, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig.thesis(
            output_dir=f"{folder}/run",
            max_steps=repeats + 1,
            sampler={"steps": 64} if loaded.denoises else {},
            logp_estimator="one_step" if loaded.denoises else "exact",
            save_steps=repeats + 2,
        )
        run = train_grpo(loaded, task.rewards, task.rows("rl"), config)
        rows = [row for row in read_rows(run / "metrics.jsonl") if 0 < row["step"] <= repeats]
    columns = ("step_time", "rollout_time", "reward_time")
    medians = {name: statistics.median(row[name] for row in rows) for name in columns}
    return {"policy": policy, "repeats": repeats, **medians, **environment(loaded.device)}


def bench_estimators(repeats: int = 5, length: int = 128, device: str = "auto") -> dict:
    """Seconds of one GRPO update without its sampling, by estimator, on the same 2 x 6 completions
    of `length` tokens, which all count: policy, reference and both backward passes. Medians, also
    of the ratio to the autoregressive twin's update, which takes turns with it."""
    require(repeats >= 1, f"repeats={repeats}: expected at least 1")
    task, runs = load_task("medcot"), {}
    prompts = [row["prompt"] for row in task.rows("rl", 2) for _ in range(6)]
    for name in ("exact", "one_step", "complementary", "coupled"):
        policy = load_policy("tiny-ar" if name == "exact" else "tiny-mdm", device=device)
        policy.sync_reference()
        config = GRPOConfig.thesis(logp_estimator=name, log_gradients=True)
        scorer = estimator(name, policy)
        rollout = _some_rollout(policy, prompts, length, config)
        generator = generator_for(0, "noise", device=policy.device)
        noise = draw_noise(rollout, 0.0, generator, scorer.samples)
        parameters = policy.trainable_parameters()
        runs[name] = partial(update, policy, rollout, scorer, noise, None, parameters, config)
    turns = [{name: _seconds(run) for name, run in runs.items()} for _ in range(repeats + 1)]
    table = pd.DataFrame(turns[1:])  # the first is to warm up
    medians = {"seconds": table.median(), "ratio_to_ar": table.div(table["exact"], axis=0).median()}
    rows = pd.DataFrame(medians).rename_axis("estimator").reset_index().to_dict("records")
    return {"rows": rows, "repeats": repeats, "length": length, **environment(policy.device)}


def _some_rollout(policy: Policy, prompts: list[str], length: int, config: GRPOConfig) -> Rollout:
    """Completions of random tokens, the same for policies that share a tokenizer."""
    encoded, draw = policy.encode(prompts, length), generator_for(0, "tokens")
    first, device, rows = max(policy.tokenizer.all_special_ids) + 1, policy.device, len(prompts)
    tokens = torch.randint(first, len(policy.tokenizer), (rows, length), generator=draw)
    return Rollout(
        prompt_ids=encoded.input_ids,
        prompt_mask=encoded.attention_mask,
        completion_ids=tokens.to(device),
        completion_mask=torch.ones(rows, length, dtype=torch.bool, device=device),
        advantages=torch.linspace(-1, 1, rows, device=device),
        counted=torch.ones(rows, dtype=torch.bool, device=device),
        sampler=config.sampler_for(policy),
    )


def bench_import(repeats: int = 7) -> dict:
    """Seconds of `import mdmrl` in a fresh interpreter, beyond those of an empty one; medians."""
    root = Path(__file__).parents[2]
    empty, ours = (
        partial(subprocess.run, [sys.executable, "-c", statement], check=True, cwd=root)
        for statement in ("pass", "import mdmrl")
    )
    empty, ours = (
        statistics.median(_seconds(run) for _ in range(repeats)) for run in (empty, ours)
    )
    return {"import_time": ours - empty, "repeats": repeats, **environment("cpu")}


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
