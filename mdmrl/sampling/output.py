"""What a sampler gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import Policy

EXACT, APPROXIMATE = "exact", "approximate"
IN_FRONT = ("sequences", "prompt_mask")  # what has columns of the prompt


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

    def below(self, rows: int) -> Step:
        """The same under so many rows of other completions."""
        remasked = self.remasked + self.remasked.new_tensor([[rows], [0]])
        return replace(self, rows=self.rows + rows, remasked=remasked)

    @classmethod
    def joined(cls, steps: Sequence[Step]) -> Step:
        names = (field.name for field in fields(cls))
        return cls(*(torch.cat([getattr(step, name) for step in steps], -1) for name in names))


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

    @classmethod
    def joined(cls, parts: Sequence[SamplerOutput], pad_token_id: int) -> SamplerOutput:
        """What several calls drew, one below the other, as if in one."""
        if len(parts) == 1:
            return parts[0]
        width, length = (
            max(getattr(part, name).shape[1] for part in parts)
            for name in ("prompt_mask", "completion_ids")
        )

        def rows(name: str, fill: int = 0) -> Tensor | None:
            found = []
            for part in parts:
                value = getattr(part, name)
                if value is None:
                    return None
                left = width - part.prompt_mask.shape[1] if name in IN_FRONT else 0
                right = length - part.completion_ids.shape[1] if name != "prompt_mask" else 0
                found.append(F.pad(value, (left, right), value=fill))
            return torch.cat(found)

        names = ("prompt_mask", "completion_mask", "logprobs", "asked", "seen")
        trajectory, above = [], 0
        for part in parts:
            trajectory.append([step.below(above) for step in part.trajectory or ()])
            above += len(part.sequences)
        steps = [Step.joined([*filter(None, same)]) for same in zip_longest(*trajectory)]
        return cls(
            sequences=rows("sequences", pad_token_id),
            completion_ids=rows("completion_ids", pad_token_id),
            **{name: rows(name) for name in names},
            completions=[text for part in parts for text in part.completions],
            nfe=sum(part.nfe for part in parts),
            token_forwards=sum(part.token_forwards for part in parts),
            trajectory=None if parts[0].trajectory is None else steps,
            optimisations={k: how for part in parts for k, how in part.optimisations.items()},
        )

    @property
    def exact(self) -> bool:
        """True where the completions are the plain loop's."""
        return APPROXIMATE not in self.optimisations.values()

    def token_lists(self) -> list[list[int]]:
        """Completion ids up to and including the first end token, one list a row."""
        pairs = zip(self.completion_ids, self.completion_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]


def checked(output, prompts: int) -> SamplerOutput:
    """What a sampler gave for so many prompts, if that is a `SamplerOutput` of as many texts."""
    count = len(output.completions) if isinstance(output, SamplerOutput) else f"{output!r:.80}"
    require(
        count == prompts,
        f"the sampler gave {count}: expected a SamplerOutput of {prompts} completions",
    )
    return output
