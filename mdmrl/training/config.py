"""What every training run is asked for, and what supervised fine-tuning adds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import ClassVar

from mdmrl.config import Config, require, unknown
from mdmrl.policies import Policy
from mdmrl.sampling import SamplerConfig
from mdmrl.sampling.config import LARGEST
from mdmrl.tasks import Task

TRACKERS = ("none", "trackio", "wandb")
MEMORY = ("gradient_checkpointing", "per_device_eval_batch_size")  # change no result
FLAT = {"max_new_tokens": "max_completion_length", "temperature": "temperature"}
NESTED = [field.name for field in fields(SamplerConfig) if field.name not in FLAT]


@dataclass
class TrainingConfig(Config):
    """Settings that all training runs have; the names are TRL's and transformers' where they have
    one.

    Attributes:
        output_dir: the run's folder; a run of the same configuration in it is resumed.
        per_device_train_batch_size: completions of one forward; times `gradient_accumulation_steps`
            and the number of processes it is the batch of an update.
        max_completion_length: most tokens of a completion, and the canvas of a diffusion model.
        sampler: any other settings of `SamplerConfig`, by name, as in {"steps": 16}.
        eval_steps: every so many updates (and at the end) complete the held-out prompts greedily.
        save_steps: every so many updates (and at the end) write a checkpoint.
        per_device_eval_batch_size: held-out prompts that are completed at once.
        gradient_checkpointing: hold the inputs of layers alone, and make the rest again in the
            backward pass: the same bits in a third of the memory, at a third more time.
        bf16: compute layers in bfloat16 (autocast); weights stay in float32.
        report_to: `trackio` or `wandb` gets the rows of the log too.
    """

    MOVED: ClassVar[Mapping[str, str]] = {
        name: f"the sampler's settings stand together: write sampler={{{name!r}: ...}}"
        for name in NESTED
    }

    output_dir: str = "runs/training"
    max_steps: int = 60
    per_device_train_batch_size: int = 12
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    max_completion_length: int = 128
    sampler: dict = field(default_factory=dict)
    eval_steps: int = 10
    save_steps: int = 20
    per_device_eval_batch_size: int = 64
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 0
    report_to: str = "none"

    # Settings that are at least 1, that are positive if given, and that have one of some names.
    COUNTS: ClassVar = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    COUNTS += ("max_completion_length", "eval_steps", "save_steps", "per_device_eval_batch_size")
    POSITIVE: ClassVar = ("learning_rate", "max_grad_norm")
    NAMED: ClassVar = {"report_to": TRACKERS}
    OWN_SAMPLER: ClassVar = {}  # what a family may set, where `sampler` says nothing

    def __post_init__(self) -> None:
        if isinstance(self.sampler, SamplerConfig):
            self.sampler = self.sampler.changed()
        super().__post_init__()

    def validate(self) -> None:
        folder = self.output_dir
        require(folder.isprintable() and folder != "", f"output_dir={folder!r}: expected a folder")
        for name in self.COUNTS:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        for name in self.POSITIVE:
            value = getattr(self, name)
            fit = value is None or 1 / LARGEST <= value <= LARGEST
            require(fit, f"{name}={value}: expected a positive number, from 1e-30 to 1e30")
        for name, known in self.NAMED.items():
            value = getattr(self, name)
            if not callable(value) and value not in known:
                raise unknown(name, value, known)
        tracker = self.report_to
        there = tracker == "none" or tracker in sys.modules or find_spec(tracker) is not None
        require(there, f"report_to={tracker!r} needs its package: pip install {tracker}")
        for name, value in self.sampler.items():
            require(
                name not in FLAT,
                f"sampler={{{name!r}: {value!r}}}: set {FLAT.get(name)}, which stands beside it",
            )
            if name not in NESTED:
                raise unknown("setting of the sampler", name, NESTED)
        # Coerced, and checked with the number of tokens.
        known = {**self.OWN_SAMPLER, **self.sampler, "temperature": self.drawn_at}
        asked = SamplerConfig(max_new_tokens=self.max_completion_length, **known)
        self.sampler = {name: getattr(asked, name) for name in self.sampler}

    @property
    def drawn_at(self) -> float:
        """The temperature at which completions are drawn."""
        return 0.0

    @property
    def batch(self) -> int:
        """Completions of an update on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollout_batch(self) -> int:
        """Completions that are drawn at once on each process."""
        return self.per_device_train_batch_size

    def micro_batches(self, rows: int, size: int | None = None) -> list[slice]:
        """What of so many rows one forward takes, `per_device_train_batch_size` or `size`."""
        size = size or self.per_device_train_batch_size
        return [slice(start, start + size) for start in range(0, rows, size)]

    def sampler_for(self, policy: Policy, greedy: bool = False) -> SamplerConfig:
        """What completes the prompts of `policy`; `greedy` takes the most probable tokens and the
        surest positions."""
        own = {name: getattr(policy, name) for name in self.OWN_SAMPLER if getattr(policy, name)}
        asked = own | self.sampler | {"temperature": 0.0 if greedy else self.drawn_at}
        drawn = ("order_temperature", "top_k", "top_p") if greedy else ()
        asked = {name: value for name, value in asked.items() if name not in drawn}
        return SamplerConfig(max_new_tokens=self.max_completion_length, **asked)

    def completed_as(self, task: Task, policy: Policy, given: Mapping):
        """The same, length and steps the task's where the settings that were `given` say nothing of
        them."""
        said = dict(self.sampler)
        if "max_completion_length" in given:
            said["max_new_tokens"] = self.max_completion_length
        sampler = task.sampler_for(policy, **said)
        length = sampler.pop("max_new_tokens", self.max_completion_length)
        return self.replace(max_completion_length=length, sampler=sampler)

    def settings_for(self, policy: Policy) -> dict:
        """Every setting that decides results as it holds for `policy`, the sampler's among them."""
        elsewhere = ["output_dir", "report_to", *MEMORY] + ([] if self.bf16 else ["bf16"])
        resolved = {k: v for k, v in self.to_dict().items() if k not in elsewhere}
        return resolved | {"sampler": self.sampler_for(policy).to_dict()}


@dataclass
class SFTConfig(TrainingConfig):
    """Settings of supervised fine-tuning; `TrainingConfig` has those that all runs share.

    Attributes:
        learning_rate: reached after `warmup_steps`; from there it falls linearly towards 0.
    """

    output_dir: str = "runs/sft"
    max_steps: int = 100
    per_device_train_batch_size: int = 8
    warmup_steps: int = 0
    weight_decay: float = 0.0
    eval_steps: int = 20
    save_steps: int = 50

    def validate(self) -> None:
        super().validate()
        decay, warmup = self.weight_decay, self.warmup_steps
        require(0 <= decay < math.inf, f"weight_decay={decay}: expected 0 or more")
        require(
            0 <= warmup < self.max_steps,
            f"warmup_steps={warmup}: expected 0 or more, fewer than max_steps={self.max_steps}",
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay: `learning_rate / (max_steps - warmup_steps)` is the
        last."""
        rise = (step + 1) / max(1, self.warmup_steps)
        fall = (self.max_steps - step) / (self.max_steps - self.warmup_steps)
        return self.learning_rate * min(1.0, rise, fall)
