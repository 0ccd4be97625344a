"""The tuned columns of Table 4-1: GRPO on the training items of its four tasks together, both
families alike, with the thesis's LoRA; they ship as adapters."""

import json
from pathlib import Path

import pandas as pd
import torch

from mdmrl.policies import add_lora, load_policy
from mdmrl.provenance import environment
from mdmrl.rl.grpo import train_grpo
from mdmrl.runs import read_rows, write_atomically
from mdmrl.study.benchmark import tuning
from mdmrl.tasks import load_task

MIXTURE = "reasoning"
# By name, the policy that is tuned.
TUNED = {f"tiny-{kind}-reasoning-tuned": f"tiny-{kind}-reasoning" for kind in ("ar", "mdm")}
# On top of `mdmrl.study.benchmark.TUNING`. At three and ten times its learning rate the
# autoregressive policy lost validation items.
CHANGES = {"per_device_train_batch_size": 64}


def tune(name: str, folder: Path, seed: int | None = None) -> Path:
    """Train what `name` says, with another seed where one is given; returns the folder of the saved
    model, beside whose weights lie the recipe (`recipe.json`) and the training log (`log.csv`)."""
    policy, task = add_lora(load_policy(TUNED[name]), seed=seed or 0), load_task(MIXTURE)
    config = tuning(policy, output_dir=str(folder), seed=seed or 0, **CHANGES)
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
    write_atomically(model / "README.md", model_card(name, recipe, log))
    return model


def model_card(name: str, recipe: dict, log: pd.DataFrame) -> str:
    """The model card of a tuned policy, from its recipe and log alone."""
    before, after = log["eval/accuracy"].dropna().iloc[[0, -1]]
    return f"""---
base_model: {recipe["start"]}
library_name: peft
license: apache-2.0
---
# {name}

A LoRA adapter on `{recipe["start"]}`, tuned by {recipe["max_steps"]} updates of GRPO, of
{recipe["per_device_train_batch_size"]} completions, on word problems, mathematics, choice and
Countdown together. For the study of reinforcement learning only.

* Validation items right, greedily: {before:.3f} before, {after:.3f} after.
* Recipe and machine: `recipe.json`; training log: `log.csv`.
* Train it again: `{recipe["command"]}`. Held-out numbers: Table 4-1, by
  `06_benchmark_tables`.
"""
