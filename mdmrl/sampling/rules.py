"""Commit rules: which of its open positions a row reveals first.

A rule is a function of the N open positions of all rows,

    rule(logits, tokens, logprobs, positions, generator) -> scores (N,)

and those of each row that score highest are revealed. `tokens` (N,) were drawn there, `positions`
(N,) are columns of the canvas. `logits` (N, V), which it must not change, and the tokens'
`logprobs` (N,) are neither tempered nor filtered; each row's largest logit is 0. What is random
comes from `generator`, on the policy's device.

`SamplerConfig.remasking` takes a name from `RULES`, a function, or a `Rule`, which says of a
function what it cannot say itself; whoever needs to know what nobody said refuses the rule.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.config import require, unknown


@dataclass(frozen=True)
class Rule:
    """A commit rule, and what else the library must know of it.

    Attributes:
        scores: the function.
        before_drawing: True if it looks at the state alone, never at `tokens` and `logprobs`.
        log_probability: True if scores are logarithms of probabilities: a threshold can be one.
        log_choice: with which probability it chose the positions that it chose, a function (or
            its name, "module:function") of a `mdmrl.rl.choice.Choice`.
    """

    scores: Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]
    before_drawing: bool = False
    log_probability: bool = False
    log_choice: Callable | str | None = None

    @property
    def name(self) -> str:
        return getattr(self.scores, "__name__", repr(self.scores))

    def __call__(self, logits, tokens, logprobs, positions, generator) -> Tensor:
        found = self.scores(logits, tokens, logprobs, positions, generator)
        require(
            isinstance(found, Tensor) and found.shape == tokens.shape and not found.isnan().any(),
            f"remasking={self.name} returned {found!r:.80}: expected {len(tokens)} numbers, one an "
            "open position",
        )
        return found.float()


def low_confidence(logits, tokens, logprobs, positions, generator) -> Tensor:
    """The probability of the drawn token."""
    return logprobs


def state_confidence(logits, tokens, logprobs, positions, generator) -> Tensor:
    """The largest probability."""
    return logits.max(-1).values - logits.logsumexp(-1)


def margin(logits, tokens, logprobs, positions, generator) -> Tensor:
    """The largest probability minus the second."""
    first, second = (logits.topk(2).values - logits.logsumexp(-1, keepdim=True)).exp().T
    return first - second


def entropy(logits, tokens, logprobs, positions, generator) -> Tensor:
    """The smallest entropy."""
    return -entropies(logits)


def sequential(logits, tokens, logprobs, positions, generator) -> Tensor:
    """Left to right."""
    return -positions.float()


def random(logits, tokens, logprobs, positions, generator) -> Tensor:
    """All sets of positions alike."""
    return torch.rand(tokens.shape, generator=generator, device=tokens.device)


def entropies(logits: Tensor) -> Tensor:
    """Entropies of softmax(logits) (N, V), in nats, (N,)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


CERTAIN = "mdmrl.rl.choice:certain"
_OURS = (
    Rule(low_confidence, False, True, "mdmrl.rl.choice:others_less_probable"),
    Rule(state_confidence, True, True, CERTAIN),
    *(Rule(scores, True, False, CERTAIN) for scores in (margin, entropy, sequential)),
    Rule(random, True, False, "mdmrl.rl.choice:any_set"),
)
RULES = {rule.name: rule for rule in _OURS}


def rule_of(remasking: str | Callable) -> Rule:
    """What `SamplerConfig.remasking` means."""
    if isinstance(remasking, str):
        if remasking not in RULES:
            raise unknown("remasking", remasking, RULES)
        return RULES[remasking]
    return remasking if isinstance(remasking, Rule) else Rule(remasking)
