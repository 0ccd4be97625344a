"""Checkpoints of a training run: what a resumed run needs to give the same bits."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mdmrl.config import Config, require
from mdmrl.policies.base import Policy
from mdmrl.rewards import check_rewards
from mdmrl.runs import Run


def begin(
    policy: Policy,
    rewards: Sequence[Callable],
    rows: Sequence[dict],
    eval_rows: Sequence[dict],
    config: Config,
    algorithm: str,
    accelerator,
    **more,
) -> Run:
    """Check a run's input, open its folder, and make the policy its own reference; `more` is as in
    `open_run`."""
    require(len(rows) > 0, "no training rows given")
    names = check_rewards(rewards, rows=[*rows, *eval_rows])
    policy.encode([row["prompt"] for row in rows], config.max_completion_length)  # they all fit
    judged = [*rows, *eval_rows]
    known = {name: known_as(reward) for name, reward in zip(names, rewards, strict=True)}
    run = open_run(policy, judged, config, algorithm, accelerator, rewards=known, **more)
    if not policy.uses_lora:
        policy.sync_reference()
    return run


def known_as(function: Callable) -> str:
    """What tells a reward, or a way of drawing, from another, so that a changed one makes another
    run: a hash of its own text, where that can be read; of an object also the `repr` that its class
    defines; of a `partial` what it binds. What it calls is not seen."""
    if isinstance(function, partial):
        return f"{known_as(function.func)} with {function.args} {function.keywords}"
    routine = inspect.isroutine(function)
    written = function if routine else type(function)
    shows = not routine and written.__repr__ is not object.__repr__
    name = repr(function) if shows else written.__qualname__
    try:
        return f"{name} {hashlib.sha256(inspect.getsource(written).encode()).hexdigest()[:10]}"
    except (OSError, TypeError):
        return name


def open_run(
    policy: Policy, rows: Sequence[dict], config: Config, algorithm: str, accelerator, **more
) -> Run:
    """The run's folder, known by all that decides the result: settings, weights, rows, the version
    of the algorithm, the number of processes, and `more`."""
    settings = {k: v for k, v in config.to_dict().items() if k != "output_dir"}
    identity = settings | {
        "algorithm": algorithm,
        "policy": policy.fingerprint(),
        "rows": hashlib.sha256(repr(rows).encode()).hexdigest()[:10],
        "processes": accelerator.num_processes,
        **more,
    }
    with accelerator.main_process_first():
        return Run(config.output_dir, identity, policy.device)


def save(
    run: Run,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    step: int,
    values: torch.nn.Module | None = None,
) -> None:
    """Write trained weights, reference and optimizer; random numbers derive from the step.

    `pretrained/` inside is an ordinary folder for `load_policy` (or, with LoRA, its adapter), and
    `values/` one for `ValueHead.from_pretrained` where there is a value head.
    """

    def write(folder: Path) -> None:
        trained = {n: p.detach().contiguous() for n, p in policy.trainable_parameters().items()}
        save_file(trained, folder / "policy.safetensors")
        save_file(policy.reference_state(), folder / "reference.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        policy.save_pretrained(folder / "pretrained")
        if values is not None:
            values.save_pretrained(folder / "values")

    run.save_checkpoint(step, write)


def restore(
    run: Run,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    values: torch.nn.Module | None = None,
) -> int:
    """Load the newest whole checkpoint if there is one; returns the step it was taken at."""
    latest = run.latest_checkpoint()
    if latest is None:
        return 0
    step, folder = latest
    parameters = policy.trainable_parameters()
    with torch.no_grad():
        for name, value in load_file(folder / "policy.safetensors").items():
            parameters[name].copy_(value)
    policy.load_reference_state(load_file(folder / "reference.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu"))
    if values is not None:
        values.load_state_dict(load_file(folder / "values" / "model.safetensors"))
    return step
