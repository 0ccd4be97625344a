"""Settings of the RL loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.rl.kl import KL_ESTIMATORS, WITH_RATIO
from mdmrl.sampling import SamplerConfig
from mdmrl.training.config import TrainingConfig

CLIPS = ("one_sided", "two_sided", "cispo")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "wd1", "spg")
RATIO_FREE = ("wd1", "spg")
LEVELS = ("token", "sequence")
FAILED = ("stop", "mask")
SCALES = ("group", "batch", "none")


@dataclass
class RLConfig(TrainingConfig):
    """Settings that GRPO and PPO share, beside those of `TrainingConfig`.

    Attributes:
        num_generations: completions of one prompt; `per_device_train_batch_size` x
            `gradient_accumulation_steps` is a multiple of it.
        per_device_rollout_batch_size: completions that are drawn at once, which takes less memory
            than learning from them and is faster with many; None draws a micro-batch.
        num_iterations: updates on one batch of rollouts.
        beta: weight of the KL from the reference policy; 0 leaves the reference out.
        kl_in_reward: charge the reward with beta times the KL, instead of the loss (`train_ppo`:
            beside it).
        epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon], or above to 1 + epsilon_high
            (DAPO's clip-higher).
        clip: `one_sided` (PPO), `two_sided` (clip(rho) A whatever the sign of A) or `cispo`
            (clip(rho) A grad log pi, the ratio as a constant; the thesis's formula).
        ref_model_sync_steps: every so many updates the policy is copied into its reference.
        failed_rewards: what becomes of samples for which a reward raises, or returns what is no
            finite number: `stop` the run, or `mask` them out of their group, warned of and counted.
        log_kl: measure the KL at beta=0 too, which costs the reference's forward passes.
        log_gradients: log the gradient norms of the loss's two parts, which costs a second backward
            pass.
    """

    num_generations: int = 6
    per_device_rollout_batch_size: int | None = None
    num_iterations: int = 1
    beta: float = 0.05
    kl_in_reward: bool = False
    epsilon: float = 0.1
    epsilon_high: float | None = None
    clip: str = "one_sided"
    ref_model_sync_steps: int = 500
    failed_rewards: str = "stop"
    log_kl: bool = False
    log_gradients: bool = False

    COUNTS: ClassVar = (*TrainingConfig.COUNTS, "num_iterations", "ref_model_sync_steps")
    POSITIVE: ClassVar = (*TrainingConfig.POSITIVE, "epsilon_high")
    NAMED: ClassVar = TrainingConfig.NAMED | {"clip": CLIPS, "failed_rewards": FAILED}
    OWN_SAMPLER: ClassVar = {"remasking": "state_confidence"}
    LEAST_GROUP: ClassVar = 1

    def validate(self) -> None:
        super().validate()
        group, least = self.num_generations, self.LEAST_GROUP
        require(
            group >= least and self.batch % group == 0,
            f"num_generations={group}, per_device_train_batch_size x gradient_accumulation_steps = "
            f"{self.batch}: expected at least {least}, and a batch that is a multiple of it",
        )
        at_once = self.rollout_batch
        require(
            at_once >= 1 and self.batch % at_once == 0,
            f"per_device_rollout_batch_size={at_once}: expected at least 1, and a divisor of "
            f"per_device_train_batch_size x gradient_accumulation_steps = {self.batch}",
        )
        require(0 <= self.beta < math.inf, f"beta={self.beta}: expected 0 or more")
        require(0 < self.epsilon < 1, f"epsilon={self.epsilon}: expected (0, 1)")
        for name, ignored, why in (
            ("kl_in_reward", self.beta == 0, "with beta=0 there is no KL"),
            ("log_kl", self.beta > 0, "with beta > 0 the KL is always logged"),
        ):
            fit = not (ignored and getattr(self, name))
            require(fit, f"{name}=True would be ignored: {why}; leave it out")

    @property
    def drawn_at(self) -> float:
        return 1.0

    @property
    def prompts_per_process(self) -> int:
        return self.batch // self.num_generations

    @property
    def rollout_batch(self) -> int:
        own = self.per_device_rollout_batch_size
        return super().rollout_batch if own is None else own

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or self.log_kl


@dataclass
class GRPOConfig(RLConfig):
    """Settings of `train_grpo`; the defaults are what notebook 04 recommends, `thesis()` has the
    thesis's. `RLConfig` and `TrainingConfig` have the settings that are not listed here.

    Attributes:
        temperature: at which completions are drawn, and scored.
        logp_estimator: what log pi of a completion is: a name of `mdmrl.rl.logprobs`, or a function
            f(policy, rollout, noise); None is the family's own, `exact` (autoregressive) or
            `trajectory`.
        kl_estimator: `k1`, `k2`, `k3` or `k3_ratio` (`mdmrl.rl.kl`), or a function of
            d = log pi - log pi_ref.
        target_kl: nats a token that the KL (`kl` in the log) is to have, `beta` being where its
            weight begins: see `adapted`.
        reward_weights: of the reward functions; None weighs all alike.
        scale_rewards: divide advantages by the standard deviation of the rewards of the `group` or
            of the whole `batch`, or by `none`.
        loss_type: the objective, `grpo`, `dr_grpo`, `dapo`, `wd1` or `spg`: see
            `mdmrl.rl.objectives`, also for psi (`wd1`), mix_weight and eubo_beta (`spg`).
        importance_sampling_level: a ratio for each `token`, or one a completion, `sequence`.
        mask_truncated_completions: keep completions without an end token out of the loss (they
            still count in their group's advantages).
        p_mask_prompt: share of prompt tokens that `one_step` masks.
    """

    output_dir: str = "runs/grpo"
    temperature: float = 1.0
    logp_estimator: str | Callable | None = None
    kl_estimator: str | Callable = "k2"
    target_kl: float | None = None
    reward_weights: list[float] | None = None
    scale_rewards: str = "group"
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    mask_truncated_completions: bool = False
    psi: float = 1.0
    mix_weight: float = 0.5
    eubo_beta: float | None = None
    p_mask_prompt: float = 0.15

    POSITIVE: ClassVar = (*RLConfig.POSITIVE, "psi", "temperature", "eubo_beta", "target_kl")
    NAMED: ClassVar = RLConfig.NAMED | {
        "loss_type": LOSS_TYPES,
        "importance_sampling_level": LEVELS,
        "scale_rewards": SCALES,
        "kl_estimator": KL_ESTIMATORS,
    }
    LEAST_GROUP: ClassVar = 2  # an advantage compares the completions of one group

    @classmethod
    def thesis(cls, **settings) -> GRPOConfig:
        """The thesis's settings: k3 at beta 1, epsilon 0.1, and log pi of a masked diffusion model
        taken as an autoregressive one's is (`ar_style`, which for an autoregressive policy is
        `exact`); LLaDA's rule of what is revealed first."""
        preset = {"logp_estimator": "ar_style", "kl_estimator": "k3", "beta": 1.0, "epsilon": 0.1}
        if settings.get("beta") == 0 and not settings.get("log_kl"):
            del preset["kl_estimator"]
        sampler = settings.pop("sampler", {})
        if isinstance(sampler, SamplerConfig):
            sampler = sampler.changed()
        if isinstance(sampler, Mapping):
            sampler = {"remasking": "low_confidence", **sampler}
        return cls(**preset | settings, sampler=sampler)

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):  # TRL's older form
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        require(0 <= self.p_mask_prompt < 1, f"p_mask_prompt={self.p_mask_prompt}: expected [0, 1)")
        require(0 <= self.mix_weight <= 1, f"mix_weight={self.mix_weight}: expected [0, 1]")
        self._refuse_what_is_ignored()

    def _refuse_what_is_ignored(self) -> None:
        kind = f"loss_type={self.loss_type!r}"
        ignored: dict[str, str] = {}
        if self.loss_type in RATIO_FREE:
            names = ("epsilon", "epsilon_high", "importance_sampling_level", "clip")
            ignored |= dict.fromkeys(names, f"{kind} has no ratio")
        if self.loss_type != "wd1":
            ignored["psi"] = f"it is for loss_type='wd1', this is {kind}"
        if self.loss_type != "spg":
            names = ("mix_weight", "eubo_beta")
            ignored |= dict.fromkeys(names, f"it is for loss_type='spg', this is {kind}")
        elif self.mix_weight == 0:
            ignored["eubo_beta"] = "with mix_weight=0 there is no upper bound"
        if not self.needs_reference:
            ignored["kl_estimator"] = "with beta=0 there is no KL, nor is it logged"
        if self.logp_estimator != "one_step" and not callable(self.logp_estimator):
            ignored["p_mask_prompt"] = f"only one_step masks prompts, not {self.logp_estimator!r}"
        if self.beta == 0:
            ignored["target_kl"] = "beta=0 is no weight to adapt"
        lacking = {kind: self.loss_type in RATIO_FREE, "kl_in_reward=True": self.kl_in_reward}
        for beside, lacks in lacking.items():
            require(
                not lacks or self.kl_estimator != WITH_RATIO,
                f"kl_estimator={WITH_RATIO!r} with {beside}, which has no ratio: expected k1, k2, "
                "k3 or a function of your own",
            )
        for field in fields(self):
            value, why = getattr(self, field.name), ignored.get(field.name)
            require(
                why is None or value == field.default,
                f"{field.name}={value!r} would be ignored: {why}; leave it at {field.default!r}",
            )

    @property
    def drawn_at(self) -> float:
        return self.temperature

    def settings_for(self, policy: Policy) -> dict:
        named = self.logp_estimator or policy.logp_estimator
        return super().settings_for(policy) | {"logp_estimator": named}


# The path of this sampler is an episode of `train_ppo`: every position is revealed in its order.
EPISODE = {"remasking": "state_confidence", "end_last": False, "stop_at_end": False}


@dataclass
class PPOConfig(RLConfig):
    """Settings of `train_ppo`; `RLConfig` and `TrainingConfig` have those that are not listed here.

    Attributes:
        states_per_forward: states scored in one forward pass; few fit a CPU's cache, a card wants
            hundreds, and block diffusion all `steps`, or it sees the text again for each part.
        lam: lambda of advantages and returns: at 1 the terminal reward less V(s_t), at 0 the reward
            of one step's own, r_t + gamma V(s_t+1) - V(s_t) (potential-based).
        half_text: reward the first half of the steps for the text that the policy makes of it
            greedily, and the second half for what it adds to that (`rl.values.in_halves`).
        value_batches: batches of base rollouts that V is fitted to first, of one completion a
            prompt; what V explains grows with them (notebook 08).
        sampler: `steps`, `step_sizes` and `block_length`; the rest is fixed (`EPISODE`), at
            temperature 1.
    """

    output_dir: str = "runs/ppo"
    states_per_forward: int = 12
    num_iterations: int = 2
    gamma: float = 1.0
    lam: float = 0.95
    value_learning_rate: float = 1e-4
    cliprange_value: float = 0.2
    value_batches: int = 40
    half_text: bool = False

    COUNTS: ClassVar = (*RLConfig.COUNTS, "states_per_forward")
    POSITIVE: ClassVar = (*RLConfig.POSITIVE, "value_learning_rate", "cliprange_value")

    def validate(self) -> None:
        super().validate()
        require(self.value_batches >= 2, f"value_batches={self.value_batches}: expected 2 or more")
        require(0 < self.gamma <= 1, f"gamma={self.gamma}: expected (0, 1]")
        require(0 <= self.lam <= 1, f"lam={self.lam}: expected [0, 1]")
        for name, value in self.sampler.items():
            require(
                name in ("steps", "step_sizes", "block_length") or EPISODE.get(name) == value,
                f"sampler={{{name!r}: {value!r}}}: an episode is drawn with {EPISODE}; expected "
                "steps, step_sizes and block_length alone",
            )

    def sampler_for(self, policy: Policy, greedy: bool = False) -> SamplerConfig:
        """The sampler whose path is the episode; raises for a policy that cannot have one."""
        require(
            policy.denoises,
            f"a policy of kind {policy.kind!r} has no denoising steps to learn from: expected a "
            "masked or block diffusion policy",
        )
        asked = EPISODE | self.sampler | {"temperature": 0.0 if greedy else 1.0}
        found = SamplerConfig(max_new_tokens=self.max_completion_length, **asked)
        found = found.in_blocks_of(policy.block_length)
        steps, length = found.denoising_steps, found.max_new_tokens
        blocks = length // (found.block_length or length)
        fit = policy.block_length is None and steps > 1 and (blocks == 1 or blocks % 2 == 0)
        require(
            fit or not self.half_text,
            f"half_text=True with {steps} steps in {blocks} blocks of a policy of kind "
            f"{policy.kind!r}: expected 2 steps or more, one block or an even number, and an 'mdm'",
        )
        return found
