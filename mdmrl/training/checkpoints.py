"""Checkpoints of a training run: what a resumed run needs to give the same bits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import Module
from torch.optim import Optimizer

from mdmrl.policies import Policy
from mdmrl.runs import Run


def save(run: Run, policy: Policy, optimizer: Optimizer, values: Module | None, step: int) -> None:
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


def restore(run: Run, policy: Policy, optimizer: Optimizer, values: Module | None) -> int:
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
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state)
    if values is not None:
        values.load_state_dict(load_file(folder / "values" / "model.safetensors"))
    return step
