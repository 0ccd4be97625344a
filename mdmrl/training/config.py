"""Settings of fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mdmrl.config import Config, require
from mdmrl.sampling import SamplerConfig


@dataclass
class SFTConfig(Config):
    """Settings of a run; the names are TRL's and transformers' where they have one.

    Attributes:
        output_dir: the run's folder; a run of the same configuration in it is resumed.
        per_device_train_batch_size: rows of one forward; times `gradient_accumulation_steps` and
            the number of processes it is the batch of an update.
        learning_rate: reached after `warmup_steps`; from there it falls linearly towards 0.
        max_completion_length: most tokens of a completion, and the canvas of a diffusion model.
        steps: the sampler's, where held-out prompts are completed; see `SamplerConfig`.
        eval_steps: every so many updates (and at the end) look at the held-out rows.
    """

    output_dir: str = "runs/sft"
    max_steps: int = 100
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_completion_length: int = 128
    steps: int | None = None
    eval_steps: int = 20
    save_steps: int = 50
    seed: int = 0

    def validate(self) -> None:
        for name in (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "eval_steps",
            "save_steps",
        ):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value}: expected a positive number")
        decay, warmup = self.weight_decay, self.warmup_steps
        require(0 <= decay < math.inf, f"weight_decay={decay}: expected 0 or more")
        require(
            0 <= warmup < self.max_steps,
            f"warmup_steps={warmup}: expected 0 or more, fewer than max_steps={self.max_steps}",
        )
        self.sampler()

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay: `learning_rate / (max_steps - warmup_steps)` is the
        last."""
        rise = (step + 1) / max(1, self.warmup_steps)
        fall = (self.max_steps - step) / (self.max_steps - self.warmup_steps)
        return self.learning_rate * min(1.0, rise, fall)

    def sampler(self) -> SamplerConfig:
        return SamplerConfig(max_new_tokens=self.max_completion_length, steps=self.steps)
