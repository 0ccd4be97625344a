"""The tuned columns of Table 4-1: GRPO on the training items of its four tasks together, both
families alike (`mdmrl.study.benchmark.TUNING`)."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch

from mdmrl.policies import load_policy
from mdmrl.provenance import environment
from mdmrl.rl.grpo import train_grpo
from mdmrl.runs import read_rows, write_atomically
from mdmrl.study.benchmark import tuning
from mdmrl.tasks import load_task

MIXTURE = "reasoning"
# By name, the policy that is tuned.
TUNED = {f"tiny-{kind}-reasoning-tuned": f"tiny-{kind}-reasoning" for kind in ("ar", "mdm")}


def tune(name: str, folder: Path, seed: int | None = None) -> Path:
    """Train what `name` says, with another seed where one is given; returns the folder of the saved
    model, beside whose weights lie the recipe (`recipe.json`) and the training log (`log.csv`)."""
    policy, task = load_policy(TUNED[name]), load_task(MIXTURE)
    config = tuning(policy, output_dir=str(folder), seed=seed or 0)
    watched = task.rows("validation", 200)
    train_grpo(policy, task.rewards, task.rows("rl"), config, watched, task.metric)
    policy.model.to(torch.bfloat16)
    policy.save_pretrained(model := folder / "model")
    log = pd.DataFrame(read_rows(folder / "metrics.jsonl"))
    log.to_csv(model / "log.csv", index=False, float_format="%.6g")
    of = {"start": TUNED[name], "task": MIXTURE, "algorithm": "grpo"}
    made = environment(policy.device) | {"command": f"mdmrl pretrain {name}"}
    recipe = of | config.settings_for(policy) | made
    write_atomically(model / "recipe.json", json.dumps(recipe, indent=1) + "\n")
    return model
