"""Several processes give what one gives, and one that fails ends the others."""

import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WAYS = """
import sys

from mdmrl import GRPOConfig, PPOConfig, SFTConfig, load_policy, train_grpo, train_ppo, train_sft

folder, output, accumulated, steps = sys.argv[1:]
rows = [{"prompt": f"What is {i}?" * (1 + i % 3), "completion": "7" * (i % 5)} for i in range(8)]
shape = {"max_steps": int(steps), "max_completion_length": 6, "per_device_train_batch_size": 4}
shape |= {"gradient_accumulation_steps": int(accumulated), "learning_rate": 1e-3}
drawn = shape | {"num_generations": 2, "sampler": {"steps": 3}}
ways = {
    "grpo": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "batch", "num_iterations": 2},
    "dapo": {"loss_type": "dapo", "kl_in_reward": True, "kl_estimator": "k1"},
    "wd1": {"loss_type": "wd1", "beta": 0, "logp_estimator": "one_step", "p_mask_prompt": 0.2},
    "spg": {"loss_type": "spg", "beta": 0, "logp_estimator": "complementary"},
}


def odd(prompts, completions, completion_ids, **columns):
    values = [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]
    return [None if "1" in p else v for p, v in zip(prompts, values)]


for name, changes in ways.items():
    config = GRPOConfig(output_dir=f"{output}/{name}", **drawn | changes)
    train_grpo(load_policy(folder), [odd], rows, config)
config = PPOConfig(output_dir=f"{output}/ppo", value_batches=3, **drawn)
train_ppo(load_policy(folder), [odd], rows, config)
train_sft(load_policy(folder), rows, SFTConfig(output_dir=f"{output}/sft", **shape))
"""

FAILS = """
import os, signal, sys, time
from pathlib import Path

from mdmrl import GRPOConfig, load_policy, train_grpo

folder, output, how = sys.argv[1:]
calls = []


def failing(prompts, completions, **columns):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        Path(output, "failed").write_text(str(time.time()))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this reward has failed")
    return [float(len(text)) for text in completions]


config = GRPOConfig(
    output_dir=f"{output}/run", max_steps=1000, max_completion_length=6, sampler={"steps": 2},
    num_generations=2, per_device_train_batch_size=4,
)
train_grpo(load_policy(folder), [failing], [{"prompt": f"{i}?"} for i in range(8)], config)
"""
STATE = "checkpoints/step-000002/optimizer.safetensors"
# What `accelerate launch` uses for several cards; its own launcher for the processor wants mpirun.
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def run(tmp_path, script, processes, *arguments):
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, *(TWO if processes == 2 else ()), tmp_path / "script.py"]
    where = tmp_path / "policy", *arguments
    return subprocess.run(
        [*command, *map(str, where)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_give_the_weights_of_one(mdm, tmp_path):
    mdm.save_pretrained(tmp_path / "policy")
    start = dict(mdm.model.named_parameters())
    for processes, steps in ((1, 2), (2, 1), (2, 2)):  # the two are cut off, and go on
        (tmp_path / str(processes)).mkdir(exist_ok=True)
        done = run(tmp_path, WAYS, processes, tmp_path / str(processes), 2 // processes, steps)
        assert done.returncode == 0, done.stderr
    ways = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert ways == ["dapo", "dr_grpo", "grpo", "ppo", "sft", "spg", "wd1"]
    off = {}
    for way in ways:
        last = f"{way}/checkpoints/step-000002/policy.safetensors"
        one, two = (load_file(tmp_path / which / last) for which in ("1", "2"))
        assert one.keys() == two.keys() == start.keys()
        moved = torch.cat([(one[name] - start[name].detach()).flatten() for name in one])
        apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
        assert moved.norm() > 0
        kept = (tmp_path / which / way / STATE for which in ("1", "2"))
        one, two = (load_file(path) for path in kept)
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
        off[way] = (apart.norm() / moved.norm()).item()
    assert max(off.values()) < 0.01, off


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_one_of_two_processes_that_fails_ends_the_other(mdm, tmp_path, how):
    mdm.save_pretrained(tmp_path / "policy")
    done = run(tmp_path, FAILS, 2, tmp_path, how)
    seconds = time.time() - float((tmp_path / "failed").read_text())
    assert done.returncode != 0
    assert seconds < 10
    said = "ValueError: this reward has failed" if how == "raise" else "Signal 9 (SIGKILL)"
    assert said in done.stderr
