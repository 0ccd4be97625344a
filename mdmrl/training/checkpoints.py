"""Checkpoints of a training run: what a resumed run needs to give the same bits."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from mdmrl.policies import Policy
from mdmrl.runs import Run, RunFolderError

OPTIMIZER = "optimizer.safetensors"


def save(
    run: Run,
    policy: Policy,
    optimizer: Optimizer,
    values: Module | None,
    reference: dict[str, Tensor],
    step: int,
) -> None:
    """Write trained weights, reference and optimizer; random numbers derive from the step.

    `pretrained/` inside is an ordinary folder for `load_policy` (or, with LoRA, its adapter), and
    `values/` one for `ValueHead.from_pretrained` where there is a value head.
    """

    def write(folder: Path) -> None:
        trained = {n: p.detach().contiguous() for n, p in weights_of(policy).items()}
        save_file(trained, folder / "policy.safetensors")
        save_file(reference, folder / "reference.safetensors")
        save_optimizer(optimizer, folder / OPTIMIZER)
        policy.save_pretrained(folder / "pretrained")
        if values is not None:
            values.save_pretrained(folder / "values")

    run.save_checkpoint(step, write)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """Those that are trained, whole."""
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


def restore(
    run: Run, policy: Policy, optimizer: Optimizer, values: Module | None, last: int
) -> int:
    """Load the newest whole checkpoint if there is one, of the `last` step without its optimizer;
    returns the step it was taken at."""
    latest = run.latest_checkpoint()
    if latest is None:
        return 0
    step, folder = latest
    parameters = weights_of(policy)
    with torch.no_grad():
        for name, value in load_file(folder / "policy.safetensors").items():
            parameters[name].copy_(value)
    policy.load_reference_state(load_file(folder / "reference.safetensors"))
    if step < last:
        load_optimizer(optimizer, folder / OPTIMIZER)
    if values is not None:
        values.load_state_dict(load_file(folder / "values" / "model.safetensors"))
    return step


def save_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Write the state of an optimizer, tensors, and in their header its settings as JSON."""
    held = optimizer.state_dict()
    tensors = {f"{i} {name}": x for i, state in held["state"].items() for name, x in state.items()}
    save_file(tensors, path, {"param_groups": json.dumps(held["param_groups"])})


def load_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` wrote; a RunFolderError for a checkpoint without it."""
    if not path.exists():
        raise RunFolderError(
            f"{path.parent} has no {path.name}: an older version wrote it, whose pickles are not "
            f"read; go on with that version, or delete {path.parent.parent} to start again"
        )
    state: dict[int, dict] = defaultdict(dict)
    with safe_open(path, "pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            number, _, part = name.partition(" ")
            state[int(number)][part] = file.get_tensor(name)
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
