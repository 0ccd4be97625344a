"""What a value function may look at of text that is half denoised.

Rows of a batch are each at a block and step of their own. The network sees whole canvases without a
cache (a cache would have one window for all rows), of a block-causal policy only the columns up to
the furthest active block; the pass that predicts a step's tokens is the one that V sees too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.policies import Policy
from mdmrl.sampling.windows import in_parts


@dataclass
class States:
    """R states, each of a row of the batch, as the network sees them before a step.

    rows: which completion, (R,). blocks, steps: the active block and how many of its steps are
    done, (R,). hidden: hidden states that predict the active block, (R, K, H). context: the mean
    of those of the prompt and the finished blocks, (R, H). written: see `mean_embedding`, (R, H).
    masked: positions of the active block that are masked, (R, K) bool. completion_ids: [MASK] where
    not revealed, logprobs: of tokens as they were drawn, 0 there, (R, L). revealed: (R, L) bool.
    """

    rows: Tensor
    blocks: Tensor
    steps: Tensor
    hidden: Tensor
    context: Tensor
    written: Tensor
    masked: Tensor
    completion_ids: Tensor
    logprobs: Tensor
    revealed: Tensor

    @property
    def features(self) -> Tensor:
        """What `mdmrl.rl.values.ValueHead` was fitted on, (R, 3H+2)."""
        start, length = self.blocks * self.masked.shape[1], self.revealed.shape[1]
        return features(self.hidden, self.context, self.written, self.masked, start, length)


Value = Callable[[States], Tensor]  # the higher the better, (R,)


class Recorder:
    """Keeps something of every state that a sampler shows its judge, of all rows equally often.

    Args:
        look: what to keep of R states, (R, ...); judge: takes V's place; without one V is 0.
    """

    def __init__(self, look: Callable[[States], Tensor], judge: Value | None = None):
        self.look, self.judge = look, judge
        self.found: list[tuple[Tensor, Tensor]] = []

    def __call__(self, states: States) -> Tensor:
        self.found.append((states.rows, self.look(states)))
        return self.judge(states) if self.judge else torch.zeros(len(states.rows))

    @property
    def looks(self) -> Tensor:
        """What was kept of every row's states in their order, (B, looks, ...)."""
        rows, kept = map(torch.cat, zip(*self.found, strict=True))
        return kept[rows.argsort(stable=True)].unflatten(0, (rows.max() + 1, -1))


def features(
    hidden: Tensor, context: Tensor, written: Tensor, masked: Tensor, start: Tensor, length: int
) -> Tensor:
    """Features (..., 3H+2) of states of a completion of `length`; float32 and detached.

    The mean hidden state of the active block (..., K, H) and of the context (..., H), the mean
    embedding of what is written (..., H), the share of the block that is masked (..., K), and where
    in the completion the block begins (`start`, (...) or less).
    """
    fraction = masked.float().mean(-1, keepdim=True)
    index = (start / length)[..., None].expand_as(fraction)
    means = (hidden.detach().mean(-2), context, written)
    return torch.cat([*(mean.float() for mean in means), fraction, index], -1)


def mean_embedding(policy: Policy, ids: Tensor, revealed: Tensor) -> Tensor:
    """Mean input embedding of the tokens `ids` (..., L) `revealed` in S states, (..., S, L) bool;
    (..., S, H), 0 where there is none; detached.

    No loss asks the hidden state at a revealed position for its token, so that V would be told
    little of the text by hidden states alone.
    """
    embedded = policy.model.get_input_embeddings().weight.detach()[ids]
    return revealed.to(embedded.dtype) @ embedded / revealed.sum(-1, keepdim=True).clamp(min=1)


def hidden_at_blocks(
    policy: Policy, canvas: Tensor, attention: Tensor, width: int, columns: Tensor
) -> tuple[Tensor, Tensor, int]:
    """One forward pass over rows at blocks of their own, in `columns` (R, K) of a canvas (R, P+L).

    Returns:
        hidden states that predict the active blocks, (R, K, H), the mean of those before them,
        (R, H), and the number of positions computed.
    """
    if policy.block_length is not None:
        stop = int(columns.max()) + 1
        pattern = policy.pattern(width, stop - width)
        hidden = policy.forward(canvas[:, :stop], attention[:, :stop], pattern)
    else:
        hidden = in_parts(policy, canvas, attention)
    real = attention[:, : hidden.shape[1]]
    before = real & (torch.arange(real.shape[1], device=real.device) < columns[:, :1])
    context = before.to(hidden.dtype)[:, None] @ hidden / before.sum(1)[:, None, None]
    rows = torch.arange(len(canvas), device=canvas.device)[:, None]
    return hidden[rows, columns - int(policy.logit_shift)], context[:, 0], real.numel()
