"""The gradient of a loss in two parts, added up micro-batch by micro-batch, and what is logged of
it."""

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from mdmrl.config import require
from mdmrl.policies import Policy

PARTS = ("surrogate", "kl")


class Gradients:
    """Gradients of the surrogate and of beta * KL, added up in the `grad` of trained parameters; or
    kept `apart` until `finish`, so that their norms are known, at the price of a second backward
    pass and of twice the memory."""

    def __init__(self, policy: Policy, parameters: dict[str, Tensor], apart: bool):
        self.policy, self.parameters = policy, [*parameters.values()]
        self.losses = dict.fromkeys(PARTS, 0.0)
        require(
            not apart or policy.sharding is None,
            "log_gradients=True: expected False where weights are shared out (FSDP), whose "
            "gradients are summed as they come",
        )
        names = PARTS if apart else ()
        self.sums = {name: [torch.zeros_like(p) for p in self.parameters] for name in names}
        for parameter in self.parameters:
            parameter.grad = None if apart else torch.zeros_like(parameter)

    def add(self, surrogate: Tensor, kl: Tensor) -> None:
        """The two parts of one micro-batch's loss, scalars; one without a gradient counts as 0."""
        parts = dict(zip(PARTS, (surrogate, kl), strict=True))
        for name, value in parts.items():
            self.losses[name] += value.item()
        learnt = {name: value for name, value in parts.items() if value.requires_grad}
        if not self.sums:
            self.policy.backward(surrogate + kl, self.parameters)
        for name in learnt if self.sums else ():
            more = {"retain_graph": name != [*learnt][-1], "allow_unused": True}
            slopes = torch.autograd.grad(learnt[name], self.parameters, **more)
            for total, slope in zip(self.sums[name], slopes, strict=True):
                if slope is not None:
                    total += slope

    def finish(self) -> dict[str, float]:
        """Set every parameter's gradient; returns the loss, its parts, and their gradient norms."""
        for parameter, *parts in zip(self.parameters, *self.sums.values(), strict=True):
            parameter.grad = sum(parts) if parts else parameter.grad
        norms = {name: get_total_norm(sums).item() for name, sums in self.sums.items()}
        return {
            "loss": sum(self.losses.values()),
            **{f"loss/{name}": value for name, value in self.losses.items()},
            **{f"grad_norm/{name}": value for name, value in norms.items()},
        }


def token_metrics(seen: dict[str, Tensor], completions: int) -> dict[str, float]:
    """What is logged of tokens (N,): of `d` = log pi - log pi_ref and `kl`, where there is a
    reference, and of the `ratio` to the old policy, where the loss has one."""
    found = {}
    if "d" in seen:
        d, kl = seen["d"], seen["kl"]
        found |= {"kl": kl.mean(), "kl/sum": kl.sum().item() / completions, "kl/max": kl.max()}
        found["log_mean_exp_neg_d"] = torch.logsumexp(-d, 0) - math.log(len(d))
    if "ratio" in seen:
        ratio = seen["ratio"]
        found |= {"ratio/mean": ratio.mean(), "ratio/min": ratio.min(), "ratio/max": ratio.max()}
        found["clip_ratio"] = seen["clipped"].float().mean()
    return {name: float(value) for name, value in found.items()}
