"""How a value function guides a sampler (`mdmrl.sampling.guided`): settings and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mdmrl.config import Config, require, unknown
from mdmrl.policies import Policy, Prompt
from mdmrl.sampling.config import SamplerConfig, require_at_least
from mdmrl.sampling.schedule import evenly

FORMS = ("faithful", "two_gates")


@dataclass
class GuideConfig(Config):
    """How V guides a sampler.

    Attributes:
        budget: the most that one completion may cost, with all that was rejected, in plain
            completions of its own prompt: positions pushed through the network, without the
            padding of its batch. Without thresholds nothing is rejected.
        form: `"faithful"` or `"two_gates"`, see `mdmrl.sampling.guided`.
        checks: after which shares of a block's steps V looks at it; None: before every step, which
            leaves no room for thresholds.
        description_length: positions that hold the description, a multiple of the block's length;
            0: there is none.
        patience: failures of one block before it goes back (two gates).
        low, high: the thresholds as quantiles of V over base rollouts: the edges of the middle band
            (faithful), tau_y, which a description must reach, and tau_x (two gates).
    """

    budget: float | None = None
    form: str = "two_gates"
    checks: list[float] | None = field(default_factory=lambda: [0.25, 0.5])
    description_length: int = 0
    patience: int = 3
    low: float = 0.2
    high: float = 0.5

    def validate(self) -> None:
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        require_at_least(self, patience=1, description_length=0)
        require(
            self.budget is None or self.budget >= 1,
            f"budget={self.budget}: expected at least 1, the cost of a plain completion",
        )
        require(
            self.checks is None or (self.checks and all(0 < share < 1 for share in self.checks)),
            f"checks={self.checks}: expected shares of a block's steps, inside (0, 1)",
        )
        low, high, faithful, given = self.low, self.high, self.form == "faithful", self.changed()
        found = f"low={low}, high={high}: expected"
        require(0 <= low <= 1 and 0 <= high <= 1, f"{found} quantiles, in [0, 1]")
        require(not faithful or low <= high, f"{found} low <= high, the edges of a band")
        ignored = "patience" if faithful else not self.description_length and "low"
        require(
            ignored not in given,
            f"{ignored}={given.get(ignored)} would be ignored with form={self.form!r}, "
            f"description_length={self.description_length}; leave it out",
        )


@dataclass
class Thresholds:
    """What V must reach, by block and point: before the first step, at each of the checks, and
    before the last step; -inf where nothing is asked.

    low, high: (blocks, 2 + checks), float64 on the processor. prompts: those that the thresholds
    were calibrated on, which they must not judge.
    """

    low: Tensor
    high: Tensor
    prompts: Sequence[Prompt] = ()

    @property
    def bands(self) -> Tensor:
        """Both, (2, blocks, 2 + checks)."""
        return torch.stack([self.low, self.high]).double()

    @classmethod
    def of(
        cls, values: Tensor, guide: GuideConfig, block_length: int, prompts: Sequence[Prompt] = ()
    ) -> Thresholds:
        """Quantiles of the `values` of base rollouts, `GuidedOutput.values`.

        Raises:
            InputError: a block that no rollout reached.
        """
        described, gates = guide.description_length // block_length, guide.form == "two_gates"
        first, values = described if gates else 0, values.cpu().double()
        low, high = torch.full((2, *values.shape[1:]), -torch.inf, dtype=torch.double)
        for block in range(first, values.shape[1]):
            require(
                not values[:, block].isnan().all(),
                f"no base rollout reached block {block}, so nothing is known of V there: give more "
                "prompts, or stop_at_end=False",
            )

        def quantile(of: Tensor, share: float) -> Tensor:
            """One of the values, so that a constant V reaches its own threshold."""
            return of.nanquantile(share, 0, interpolation="lower")

        high[first:, 1:-1] = quantile(values[:, first:, 1:-1], guide.high)
        if not gates:
            low[first:, 1:-1] = quantile(values[:, first:, 1:-1], guide.low)
        elif described:
            low[first, 0] = high[first, 0] = quantile(values[:, first, 0], guide.low)
        return cls(low, high, tuple(prompts))


def steps_of_blocks(config: SamplerConfig) -> list[int]:
    length = config.max_new_tokens
    return evenly(config.denoising_steps, length // (config.block_length or length))


def points_of_blocks(config: SamplerConfig, guide: GuideConfig) -> list[list[int]]:
    """The steps of every block before which V looks at it; -1 for none, where a block has fewer
    steps than another and V looks at all. That two of them coincide is an InputError."""
    counts = steps_of_blocks(config)
    if guide.checks is None:
        return [[-1] * (max(counts) - steps) + list(range(steps)) for steps in counts]
    points = [[0, *(int(c * steps) for c in guide.checks), steps - 1] for steps in counts]
    for steps, (first, *inside, last) in zip(counts, points, strict=True):
        require(
            all(a < b for a, b in pairwise([first, *inside, last])),
            f"checks={guide.checks} of a block of {steps} steps come after {inside} of them: "
            f"expected rising numbers between 0 and {last}; give more steps",
        )
    return points


def checked(
    policy: Policy, prompts: Sequence[Prompt], config: SamplerConfig, guide: GuideConfig, thresholds
) -> SamplerConfig:
    """`config` with the policy's blocks, if all that was asked for can be had together."""
    require(
        policy.denoises,
        f"a policy of kind {policy.kind!r} has no denoising steps to look at: expected a masked or "
        "block diffusion policy",
    )
    config = config.in_blocks_of(policy.block_length)
    for name in ("threshold", "entropy_bound", "revise", "cfg_scale", "cache"):
        given = getattr(config, name)
        require(
            not given,
            f"{name}={given}: rows at different blocks and steps share a pass, which leaves no "
            "room for it; leave it out",
        )
    length, described = config.max_new_tokens, guide.description_length
    block = config.block_length or length
    require(
        described < length and described % block == 0,
        f"description_length={described}: expected a multiple of the block's {block} positions, "
        f"below max_new_tokens={length}",
    )
    if thresholds is not None:
        check_thresholds(prompts, config, guide, thresholds, length // block)
    return config


def check_thresholds(
    prompts: Sequence[Prompt], config: SamplerConfig, guide: GuideConfig, thresholds, blocks: int
) -> None:
    """Refuse thresholds that are not of so many blocks, or not for these prompts."""
    require(guide.checks is not None, "checks=None: expected shares of a block's steps")
    require(
        guide.budget is not None,
        "budget=None: expected what a completion may cost, in plain ones, or no thresholds",
    )
    require(
        config.temperature > 0 or config.order_temperature > 0 or config.remasking == "random",
        f"temperature={config.temperature}: a block drawn again would be the same; expected more "
        "than 0",
    )
    low, high, shape = thresholds.low, thresholds.high, (blocks, 2 + len(guide.checks))
    require(
        low.shape == high.shape == shape,
        f"thresholds of shape {tuple(low.shape)}: expected {shape}, a block and its points, both "
        "low and high; calibrate on this sampler",
    )
    require(
        bool((low <= high).all()),
        f"thresholds low={low.tolist()}, high={high.tolist()}: expected low <= high",
    )
    shared = [prompt for prompt in prompts if prompt in thresholds.prompts]
    require(
        not shared,
        f"{len(shared)} of the prompts are among those that the thresholds were calibrated on, "
        f"first {shared[:1]}: expected others",
    )
