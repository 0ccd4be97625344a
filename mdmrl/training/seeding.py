"""The global random numbers of an update."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mdmrl.runs import derived_seed, kept_random_state


@contextmanager
def seeded(seed: int, step: int, index: int, device: torch.device) -> Iterator[None]:
    """A context in which the global random numbers of Python, NumPy and torch, which a function of
    one's own may draw, follow from these; the state before is put back."""
    drawn = derived_seed(seed, "global", step, index)
    python, numpy = random.getstate(), np.random.get_state()
    with kept_random_state(device):
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        torch.manual_seed(drawn)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
