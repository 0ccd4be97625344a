"""Which rows an update learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdmrl.runs import generator_for


def rows_of_step(
    rows: Sequence[dict], count: int, step: int, rank: int, processes: int, seed: int
) -> list[dict]:
    """This process's `count` rows of a step, from an endless reading of `rows`, shuffled anew each
    epoch; they depend on (seed, step, rank) alone."""

    def at(position: int) -> dict:
        epoch, index = divmod(position, len(rows))
        order = torch.randperm(len(rows), generator=generator_for(seed, "prompts", epoch))
        return rows[order[index].item()]

    first = (step * processes + rank) * count
    return [at(first + i) for i in range(count)]
