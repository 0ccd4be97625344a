"""How many open positions each denoising step reveals."""

from collections.abc import Sequence

import torch
from torch import Tensor

STEP_SIZES = ("equal", "ascending")


def evenly(total: int | Tensor, parts: int) -> list:
    """`total` shared out over `parts`, evenly, the remainder to the first ones."""
    base, remainder = total // parts, total % parts
    return [base + (remainder > part) for part in range(parts)]


def revealed_after(step_sizes: str | Sequence[int], asked: Tensor, steps: int) -> Tensor:
    """How many of the positions `asked` of each row in a block, (B,), are revealed after each of
    its `steps`, (steps, B); see `SamplerConfig.step_sizes`. Where fewer are asked than the sizes
    add up to, the last steps go without."""
    if step_sizes == "equal":
        return torch.stack(evenly(asked, steps)).cumsum(0)
    if step_sizes == "ascending":
        step_sizes = [2**step for step in range(steps - 1)] + [int(asked.max())]
    done = torch.tensor(step_sizes, device=asked.device).cumsum(0)
    return done[:, None].minimum(asked)
