"""What a sampler gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mdmrl.policies import Policy

EXACT, APPROXIMATE = "exact", "approximate"


@dataclass
class Step:
    """What one denoising step did, as flat lists: N tokens revealed, and M masked again before.

    rows, positions: (N,) in the completion, a row's in the order in which they were chosen where
    that is drawn (`order_temperature`). tokens: (N,). logprobs: (N,), of the probability each was
    drawn with. remasked: rows and positions, (2, M).
    """

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    logprobs: Tensor
    remasked: Tensor


@dataclass
class SamplerOutput:
    """Completions and what they cost.

    Attributes:
        sequences: token ids, prompt first and left-padded, (B, P+L).
        completions: texts up to the first end token.
        completion_ids: (B, L); completion_mask: True up to and including the first end token.
        logprobs: log-probability each token was drawn with, (B, L).
        nfe: forward passes, one a step (even where a CPU takes the rows in parts);
            token_forwards: positions pushed through the network.
        trajectory: one `Step` a denoising step when recorded, else None.
        asked: positions that were [MASK] at the start, (B, L), where denoised.
        seen: positions that the network sees, (B, L), None where it sees all.
        optimisations: what was saved against the plain loop, each `"exact"` (the same tokens at
            temperature 0, the same distribution otherwise) or `"approximate"`.
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
    asked: Tensor | None = None
    seen: Tensor | None = None
    optimisations: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, sequences: Tensor, prompt_mask: Tensor, logprobs: Tensor, **more):
        """What is behind the prompts of `sequences` (B, P+L), drawn with `logprobs` (B, L)."""
        completion = sequences[:, prompt_mask.shape[1] :]
        mask = policy.completion_mask(completion)
        texts = policy.decode(completion, mask)
        return cls(sequences, prompt_mask, completion, mask, texts, logprobs, **more)

    @property
    def exact(self) -> bool:
        """True where the completions are the plain loop's."""
        return APPROXIMATE not in self.optimisations.values()

    def token_lists(self) -> list[list[int]]:
        """Completion ids up to and including the first end token, one list a row."""
        pairs = zip(self.completion_ids, self.completion_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]
