"""The network as denoising steps see it: which columns of the canvas go through, what is kept.

A step needs hidden states at the active block, columns [a, b) of W. What else must be computed:

    policy           cache     a block's first step, a refresh      any other step
    bidirectional    none      [0, W)                               [0, W)
    bidirectional    prefix    [0, W)                               [a, W)
    bidirectional    dual      [0, W)                               [a, b)
    block-causal     always    what was finished since the last     [a, b)
                               first step, and the block

Columns outside the window stand in with the keys and values of the last time they were computed. In
a bidirectional network those depend on what has been revealed since, so the two caches are
approximate (Wu et al. 2025, Fast-dLLM); in a block-causal one finished columns see nothing later,
so the cache is exact, and a block's first step stores the clean keys of the block before it at no
extra pass. A policy that shifts its logits needs one column more to the left.
"""

import torch
from torch import Tensor

from mdmrl.policies import Policy
from mdmrl.policies.patterns import packed, positions_of
from mdmrl.sampling.config import SamplerConfig

# Activations of about so many positions stay in a CPU's cache. A GPU wants all at once.
POSITIONS_AT_ONCE = 1536


def in_parts(policy: Policy, tokens: Tensor, attention: Tensor) -> Tensor:
    """Hidden states of rows that nothing else is known of, (R, W, H)."""
    parts = -(-tokens.numel() // POSITIONS_AT_ONCE) if tokens.device.type == "cpu" else 1
    pairs = zip(tokens.chunk(parts), attention.chunk(parts), strict=True)
    return torch.cat([policy.hidden_states(*pair) for pair in pairs])


class Window:
    """The network as denoising steps see it; counts what they cost.

    Args:
        attention: real tokens of the canvas, (B, W) bool, of whose columns the prompt has `width`.
        cache: None, "prefix" or "dual"; a block-causal policy has its own.
    """

    def __init__(self, policy: Policy, attention: Tensor, width: int, cache: str | None):
        self.policy, self.attention, self.cache = policy, attention, cache
        pattern = policy.pattern(width, attention.shape[1] - width)
        self.sees = None if pattern is None else packed(pattern)  # None: all see all others
        self.positions = positions_of(attention)
        self.stored = None if cache is None and pattern is None else KeyValues(attention)
        self.clean = 0  # columns whose keys and values are final, where block-causal
        self.nfe = self.token_forwards = 0

    def hidden(self, canvas: Tensor, rows: Tensor, a: int, b: int, fresh: bool) -> Tensor:
        """Hidden states that predict columns [a, b) of some rows of `canvas` (B, W): (R, b-a, H).

        Args:
            rows: (R,), indices; fresh: a block's first step, or a refresh.
        """
        left, seen = a - int(self.policy.logit_shift), canvas.shape[1]
        start, stop = 0, seen
        if self.sees is not None:
            start, stop, seen = (self.clean if fresh else a), b, b
            self.clean = a
        elif not fresh and self.cache is not None:
            start, stop = left, b if self.cache == "dual" else seen
        tokens = canvas[rows, start:stop]
        self.nfe, self.token_forwards = self.nfe + 1, self.token_forwards + tokens.numel()
        if self.stored is None:
            hidden = in_parts(self.policy, tokens, self.attention[rows])
        else:
            visible = self.attention[rows, None, None, :seen]  # (R, 1, 1, K)
            if self.sees is not None:
                visible = visible & self.sees[start:stop, :seen]
            self.stored.open(rows, start, stop, seen)
            positions = self.positions[rows, start:stop]
            hidden = self.policy.hidden_states(tokens, visible, self.stored, positions)
        return hidden[:, left - start : left - start + b - a]


class Predictor:
    """Logits at open positions.

    With `cfg_scale` there are twice as many rows: below each lies its twin, whose prompt is masked.
    """

    def __init__(
        self, policy: Policy, canvas: Tensor, attention: Tensor, width: int, config: SamplerConfig
    ):
        self.policy, self.scale = policy, config.cfg_scale
        twin = canvas.clone()
        twin[:, :width] = torch.where(attention[:, :width], policy.mask_token_id, twin[:, :width])
        self.both = torch.cat([canvas, twin]) if self.scale else canvas.clone()
        self.canvas = self.both[: len(canvas)]
        self.offsets = range(0, len(self.both), len(canvas))
        self.window = Window(policy, attention.repeat(len(self.offsets), 1), width, config.cache)

    def write(self, rows: Tensor, columns: Tensor, tokens: Tensor | int) -> None:
        for offset in self.offsets:
            self.both[rows + offset, columns] = tokens

    def logits(self, rows: Tensor, todo: Tensor, a: int, b: int, fresh: bool) -> Tensor:
        """Logits (N, V) at the open positions `todo` (R, b-a) of `rows`, columns [a, b)."""
        rows = torch.cat([rows + offset for offset in self.offsets])
        hidden = self.window.hidden(self.both, rows, a, b, fresh)
        logits = self.policy.head(hidden[todo.repeat(len(self.offsets), 1)])
        if not self.scale:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (1 + self.scale) * (conditional - unconditional)


class KeyValues:
    """Keys and values of every column, overwritten where a window is computed again.

    It answers the one call that transformers' attention layers make of a cache, `Cache.update`
    (`Cache.crop` and appending, which their own classes build on, cannot overwrite).
    """

    def __init__(self, attention: Tensor):
        self.batch, self.width = attention.shape
        self.layers: list[tuple[Tensor, Tensor]] = []

    def open(self, rows: Tensor, start: int, stop: int, seen: int) -> None:
        """The next forward pass computes columns [start, stop) of `rows` and sees [0, seen)."""
        # Most often all rows: a slice reads them without a copy.
        self.rows = slice(None) if len(rows) == self.batch else rows
        self.window, self.seen = slice(start, stop), seen

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Store new keys and values (R, heads, window, D) of a layer; returns all that is seen."""
        if layer == len(self.layers):
            shape = (self.batch, key.shape[1], self.width, key.shape[3])
            self.layers.append((key.new_zeros(shape), value.new_zeros(shape)))
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[self.rows, :, self.window] = new
        keys, values = (store[self.rows, :, : self.seen] for store in self.layers[layer])
        return keys, values
