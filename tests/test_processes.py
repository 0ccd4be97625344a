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
import os, sys

from mdmrl import GRPOConfig, PPOConfig, SFTConfig, load_policy, train_grpo, train_ppo, train_sft

folder, output, accumulated, *updates = sys.argv[1:]
rows = [{"prompt": f"What is {i}?" * (1 + i % 3), "completion": "7" * (i % 5)} for i in range(8)]
shape = {"max_completion_length": 6, "per_device_train_batch_size": 4}
shape |= {"gradient_accumulation_steps": int(accumulated), "learning_rate": 1e-3}
drawn = shape | {"num_generations": 2, "sampler": {"steps": 3}}
ways = {
    "grpo": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "batch", "num_iterations": 2,
                "ref_model_sync_steps": 1, "per_device_rollout_batch_size": 2},
    "dapo": {"loss_type": "dapo", "kl_in_reward": True, "kl_estimator": "k1"},
    "wd1": {"loss_type": "wd1", "beta": 0, "logp_estimator": "one_step", "p_mask_prompt": 0.2},
    "spg": {"loss_type": "spg", "beta": 0, "logp_estimator": "complementary"},
}
if "ACCELERATE_USE_FSDP" in os.environ:
    ways = {name: ways[name] for name in ("dr_grpo", "dapo")}


def odd(prompts, completions, completion_ids, **columns):
    values = [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]
    return [None if "1" in p else v for p, v in zip(prompts, values)]


for steps in map(int, updates):  # a second one goes on from the first one's checkpoint
    for name, changes in ways.items():
        config = GRPOConfig(output_dir=f"{output}/{name}", max_steps=steps, **drawn | changes)
        train_grpo(load_policy(folder), [odd], rows, config)
    config = PPOConfig(output_dir=f"{output}/ppo", max_steps=steps, value_batches=3, **drawn)
    train_ppo(load_policy(folder), [odd], rows, config)
    config = SFTConfig(output_dir=f"{output}/sft", max_steps=steps, **shape)
    train_sft(load_policy(folder), rows, config)
"""

# Two micro-batches here, of three passes and one, and one there, beside passes of which nothing is
# learnt: the mean gradient is that of all texts on whole weights.
SHARDS = """
import torch

from mdmrl.training.loop import accelerator_for

policy, plain = load_policy(folder), load_policy(folder)
rank = accelerator_for(policy).process_index
policy.sync_reference()
texts = torch.arange(9, 45).view(6, 1, 6)
steps = [[(0, 1, 2), (3,)], [(4,)]]  # texts of each micro-batch of each process, one a pass


def value(policy, text):
    return policy.logits(text)[:, ::2].log_softmax(-1).square().mean()


def learn(policy, asked):
    loss = torch.zeros(())
    for text in texts[list(asked)]:
        loss = loss + value(policy, text)
    policy.backward(loss)


for again in (False, True):
    with policy.computing(False, again), policy.together():
        if rank:
            with policy.reference():
                there = value(policy, texts[5])
            with torch.no_grad():
                here = value(policy, texts[5])
        for asked in steps[rank]:
            learn(policy, asked)
    for asked in (*steps[0], *steps[1]):
        learn(plain, asked)
    weights = dict(plain.model.named_parameters())
    assert policy.trainable_parameters().keys() == weights.keys()
    for name, shard in policy.trainable_parameters().items():
        assert shard.to_local().shape != shard.shape
        assert torch.allclose(2 * shard.grad.full_tensor(), weights[name].grad, atol=1e-6), name
        shard.grad = weights[name].grad = None
    assert policy.fingerprint() == plain.fingerprint()
    if rank:
        assert there == here == value(plain, texts[5])
try:
    with policy.reference():
        policy.logits(texts[0])
except ValueError as error:
    assert "outside of policy.together()" in str(error)
else:
    raise AssertionError("a pass that nobody answers")
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
# What `accelerate launch --use_fsdp --fsdp_version 2` sets.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# What `accelerate launch` uses for several cards; its own launcher for the processor wants mpirun.
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def run(tmp_path, script, processes, *arguments, **environment):
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, *(TWO if processes == 2 else ()), tmp_path / "script.py"]
    where = tmp_path / "policy", *arguments
    return subprocess.run(
        [*command, *map(str, where)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_processes_give_the_weights_of_one(mdm, tmp_path):
    """Each holds all weights, or shards of them; both times the two are cut off, and go on."""
    mdm.save_pretrained(tmp_path / "policy")
    start = dict(mdm.model.named_parameters())
    for name, script, processes, *asked, how in (
        ("one", WAYS, 1, 2, 2, {}),
        ("whole", WAYS, 2, 1, 1, 2, {}),
        ("shards", WAYS + SHARDS, 2, 1, 1, 2, FSDP),
    ):
        done = run(tmp_path, script, processes, tmp_path / name, *asked, **how)
        assert done.returncode == 0, done.stderr
    ways = {name: {path.name for path in (tmp_path / name).iterdir()} for name in ("one", "shards")}
    assert ways["one"] == {"dapo", "dr_grpo", "grpo", "ppo", "sft", "spg", "wd1"}
    assert ways["shards"] == {"dapo", "dr_grpo", "ppo", "sft"}
    off = {}
    for path in [*tmp_path.glob("whole/*"), *tmp_path.glob("shards/*")]:
        folders = (tmp_path / "one" / path.name, path)
        for file in ("policy", "reference", "optimizer", "pretrained/model"):
            last = f"checkpoints/step-000002/{file}.safetensors"
            one, two = (load_file(folder / last) for folder in folders)
            assert one.keys() == two.keys()
            assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one), file
            if file == "policy":
                assert one.keys() == start.keys()
                moved = torch.cat([(one[name] - start[name].detach()).flatten() for name in one])
                apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
                assert moved.norm() > 0
                off[str(path)] = (apart.norm() / moved.norm()).item()
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
