"""What a sampler is asked for and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.config import Config, require, unknown

REMASKING = ("low_confidence", "random")


@dataclass
class SamplerConfig(Config):
    """How completions are drawn, for every family.

    Attributes:
        max_new_tokens: completion positions, L.
        steps: denoising steps of a masked diffusion policy; None means half of `max_new_tokens`, as
            in d1. An autoregressive policy takes one step a token whatever is asked.
        remasking: which positions a step reveals, as LLaDA names it: `"low_confidence"` keeps the
            most probable of the drawn tokens, `"random"` a uniform choice.
        end_last: reveal positions whose most probable token ends the text only once no other is
            left, as LLaDA does for its instruct models. Without it, a canvas that is filled up
            with end tokens is revealed from its far end, where they are surest, and texts come out
            short or empty. The most probable token decides, not the drawn one: at temperature 1
            the redrawing of postponed positions would select against end tokens.
        temperature: 0 takes the most probable token.
        suppress_mask: never draw [MASK]; with False a drawn [MASK] is committed like any token
            and stays in the text, as it can with Dream.
    """

    max_new_tokens: int = 128
    steps: int | None = None
    remasking: str = "low_confidence"
    end_last: bool = True
    temperature: float = 0.0
    suppress_mask: bool = True

    def validate(self) -> None:
        if self.remasking not in REMASKING:
            raise unknown("remasking", self.remasking, REMASKING)
        require(
            self.max_new_tokens >= 1,
            f"max_new_tokens={self.max_new_tokens}: expected at least 1",
        )
        require(
            self.steps is None or 1 <= self.steps <= self.max_new_tokens,
            f"steps={self.steps}: expected 1 to max_new_tokens={self.max_new_tokens}, "
            "since a step reveals at least one token",
        )
        require(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature}: expected 0 (greedy) or more",
        )

    @property
    def denoising_steps(self) -> int:
        return -(-self.max_new_tokens // 2) if self.steps is None else self.steps


@dataclass
class Step:
    """What one denoising step revealed: positions in the completion, tokens, and the logarithm of
    the probability they were drawn with; each (B, k)."""

    positions: Tensor
    tokens: Tensor
    logprobs: Tensor


@dataclass
class SamplerOutput:
    """Completions and what they cost.

    Attributes:
        sequences: token ids, prompt first and left-padded, (B, P+L).
        completions: texts up to the first end token.
        completion_ids: (B, L); completion_mask: True up to and including the first end token.
        logprobs: log-probability each token was drawn with, (B, L).
        nfe: forward passes; token_forwards: positions pushed through the network.
        trajectory: one `Step` a denoising step when recorded, else None.
    """

    sequences: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    completions: list[str]
    logprobs: Tensor
    nfe: int
    token_forwards: int
    trajectory: list[Step] | None = None

    def token_lists(self) -> list[list[int]]:
        """Completion ids up to and including the first end token, one list a row."""
        pairs = zip(self.completion_ids, self.completion_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token from every row of `logits` (..., V).

    Returns:
        tokens and log-probabilities under softmax(logits / temperature), both (...); at
        temperature 0 the most probable token and its log-probability under softmax(logits).
    """
    if temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, best - logits.logsumexp(-1)
    logits = logits / temperature
    # argmax of p / e with e ~ Exp(1) is a draw from p (the Gumbel trick without two logarithms).
    noise = torch.empty_like(logits).exponential_(generator=generator)
    tokens = (logits - noise.log()).argmax(-1)
    return tokens, logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
