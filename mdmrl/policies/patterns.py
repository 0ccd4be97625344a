"""Attention patterns with blocks: which column of a sequence sees which.

A canvas of block diffusion is a prompt, block 0, and a completion, blocks 1, 2, ... A position of
the text sees its own block and those before it. A masked block is predicted from itself and the
clean blocks before it, and many can be in one forward pass, as noised copies beside the clean text
(Arriola et al. 2025, BD3-LM):

    copy 0      the clean canvas
    copy k > 0  the k-th noised copy of some of its columns, which no other copy sees
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def blocks_of(width: int, length: int, block_length: int, device=None) -> Tensor:
    """The block of every column, (P+L,): 0 for the prompt, then 1, 1, ..., 2, 2, ..."""
    blocks = 1 + torch.arange(length, device=device) // block_length
    return torch.cat([blocks.new_zeros(width), blocks])


def packed(block: Tensor, copy: Tensor | None = None) -> Tensor:
    """Which columns (second dimension) each column (first) sees, (N, N) bool: earlier blocks of the
    clean text, and its own block in its own copy.

    Args:
        block, copy: of each column, (N,); without `copy` all are clean.
    """
    copy = torch.zeros_like(block) if copy is None else copy
    earlier = (block[:, None] > block) & (copy == 0)
    return earlier | ((block[:, None] == block) & (copy[:, None] == copy))


def positions_of(attention: Tensor) -> Tensor:
    """The position of every column (B, W) among the real ones of its row, from 0."""
    return (attention.long().cumsum(1) - 1).clamp(min=0)


def hidden_beside(
    policy,
    canvas: Tensor,
    attention: Tensor,
    pattern: Tensor,
    noised: Tensor,
    columns: Tensor,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of a clean canvas (B, W, H) and of noised columns beside it (B, N, H), in one
    forward pass.

    Args:
        canvas, attention: clean token ids and which are real, (B, W).
        pattern: `policy.pattern` of at least all columns named here.
        noised: token ids, (B, N). columns: whose place they take, (N,), also such as lie behind the
            canvas. copy: to which copy they belong, (N,), by default all to the first.
    """
    width = canvas.shape[1]
    copy = torch.ones_like(columns) if copy is None else copy
    real = F.pad(attention.bool(), (0, len(pattern) - width), value=True)
    chosen = torch.cat([torch.arange(width, device=columns.device), columns])  # (W+N,)
    sees = packed(pattern[chosen], F.pad(copy, (width, 0)))
    hidden = policy.hidden_states(
        torch.cat([canvas, noised], 1),
        sees & real[:, chosen][:, None, None],
        position_ids=positions_of(real)[:, chosen],
    )
    return hidden[:, :width], hidden[:, width:]
