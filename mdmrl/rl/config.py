"""Settings of the RL loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mdmrl.config import Config, require, unknown
from mdmrl.policies import Policy
from mdmrl.rl.kl import KL_ESTIMATORS
from mdmrl.sampling import SamplerConfig

CLIPS = ("one_sided", "two_sided", "cispo")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "wd1", "spg")
RATIO_FREE = ("wd1", "spg")
LEVELS = ("token", "sequence")


@dataclass
class GRPOConfig(Config):
    """Settings of a run; the names are TRL's and transformers' where they have one.

    Attributes:
        output_dir: the run's folder; a run of the same configuration in it is resumed.
        per_device_train_batch_size: completions scored in one forward; times
            `gradient_accumulation_steps` and the number of processes it is the batch of an update,
            a multiple of `num_generations`.
        num_iterations: updates on one batch of rollouts.
        loss_type: the objective, `grpo`, `dr_grpo`, `dapo`, `wd1` or `spg`: see
            `mdmrl.rl.objectives`, also for psi (`wd1`), mix_weight and eubo_beta (`spg`).
        importance_sampling_level: a ratio for each `token`, or one a completion, `sequence`.
        clip: `one_sided` (PPO), `two_sided` (clip(rho) A whatever the sign of A) or `cispo`
            (clip(rho) A grad log pi, the ratio as a constant).
        kl_estimator: `k1`, `k2` or `k3`.
        kl_in_reward: take beta times its KL, summed over tokens, off each completion's reward,
            instead of putting the KL in the loss.
        logp_estimator: `exact` (autoregressive), `one_step` or another of `mdmrl.rl.logprobs`.
        p_mask_prompt: share of prompt tokens that `one_step` masks.
        steps, block_length, remasking, order_temperature, end_last, temperature, suppress_mask: the
            sampler's, see `SamplerConfig`.
        eval_steps: every so many updates (and at the end) complete the held-out prompts greedily.
    """

    output_dir: str = "runs/grpo"
    max_steps: int = 60
    per_device_train_batch_size: int = 12
    gradient_accumulation_steps: int = 1
    num_generations: int = 6
    num_iterations: int = 1
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    beta: float = 1.0
    epsilon: float = 0.1
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    clip: str = "one_sided"
    psi: float = 1.0
    mix_weight: float = 0.5
    eubo_beta: float | None = None
    kl_estimator: str = "k3"
    kl_in_reward: bool = False
    logp_estimator: str = "one_step"
    p_mask_prompt: float = 0.15
    ref_model_sync_steps: int = 500
    max_completion_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    remasking: str = "low_confidence"
    order_temperature: float = 0.0
    end_last: bool = True
    temperature: float = 1.0
    suppress_mask: bool = True
    eval_steps: int = 10
    save_steps: int = 20
    seed: int = 0

    def validate(self) -> None:
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        require(
            self.num_generations >= 2,
            f"num_generations={self.num_generations}: expected at least 2, since an advantage "
            "compares the completions of one group",
        )
        require(
            batch >= 1 and batch % self.num_generations == 0,
            f"per_device_train_batch_size x gradient_accumulation_steps = {batch}: expected a "
            f"multiple of num_generations={self.num_generations}",
        )
        for name in (
            "max_steps",
            "num_iterations",
            "ref_model_sync_steps",
            "eval_steps",
            "save_steps",
            "per_device_train_batch_size",
        ):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("learning_rate", "epsilon", "psi", "max_grad_norm", "temperature"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value}: expected a positive number")
        require(0 <= self.beta < math.inf, f"beta={self.beta}: expected 0 or more")
        require(0 <= self.p_mask_prompt < 1, f"p_mask_prompt={self.p_mask_prompt}: expected [0, 1)")
        require(0 <= self.mix_weight <= 1, f"mix_weight={self.mix_weight}: expected [0, 1]")
        b = self.eubo_beta
        require(b is None or 0 < b < math.inf, f"eubo_beta={b}: expected a positive number")
        for name, known in (
            ("loss_type", LOSS_TYPES),
            ("importance_sampling_level", LEVELS),
            ("clip", CLIPS),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        self._refuse_what_is_ignored()
        self.sampler()

    def _refuse_what_is_ignored(self) -> None:
        kind = f"loss_type={self.loss_type!r}"
        ignored: dict[str, str] = {}
        if self.loss_type in RATIO_FREE:
            names = ("epsilon", "importance_sampling_level", "clip")
            ignored |= dict.fromkeys(names, f"{kind} has no ratio")
        if self.loss_type != "wd1":
            ignored["psi"] = f"it is for loss_type='wd1', this is {kind}"
        if self.loss_type != "spg":
            names = ("mix_weight", "eubo_beta")
            ignored |= dict.fromkeys(names, f"it is for loss_type='spg', this is {kind}")
        elif self.mix_weight == 0:
            ignored["eubo_beta"] = "with mix_weight=0 there is no upper bound"
        if self.beta == 0:
            ignored["kl_in_reward"] = "with beta=0 there is no KL"
        for field in fields(self):
            value, why = getattr(self, field.name), ignored.get(field.name)
            require(
                why is None or value == field.default,
                f"{field.name}={value!r} would be ignored: {why}; leave it at {field.default!r}",
            )

    @property
    def prompts_per_process(self) -> int:
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return batch // self.num_generations

    def sampler(self, greedy: bool = False) -> SamplerConfig:
        """What draws completions; `greedy` takes the most probable tokens and surest positions."""
        return SamplerConfig(
            max_new_tokens=self.max_completion_length,
            steps=self.steps,
            block_length=self.block_length,
            remasking=self.remasking,
            end_last=self.end_last,
            order_temperature=0.0 if greedy else self.order_temperature,
            temperature=0.0 if greedy else self.temperature,
            suppress_mask=self.suppress_mask,
        )


@dataclass
class PPOConfig(Config):
    """Settings of a run; the names are TRL's and transformers' where they have one.

    Attributes:
        output_dir: the run's folder; a run of the same configuration in it is resumed.
        per_device_train_batch_size: completions of an update on each process, a multiple of
            `num_generations`, which are drawn for each prompt.
        states_per_forward: states scored in one forward pass; few fit a CPU's cache, a card wants
            hundreds, and block diffusion all `steps`, or it sees the text again for each part.
        num_iterations: updates on one batch of rollouts.
        kl_in_reward: charge each step for its state's KL too.
        clip: `one_sided` (PPO), `two_sided` (clip(rho) A whatever the sign of A) or `cispo`
            (clip(rho) A grad log pi, the ratio as a constant; the thesis's formula).
        lam: lambda of advantages and returns.
        value_batches: batches of base rollouts that V is fitted to first, of one completion a
            prompt; what V explains grows with them (notebook 08).
        steps, block_length: the sampler's, see `SamplerConfig`. The rest of it is fixed:
            `state_confidence`, temperature 1, no [MASK], every position revealed in its own order.
        eval_steps: every so many updates (and at the end) complete the held-out prompts greedily.
    """

    output_dir: str = "runs/ppo"
    max_steps: int = 60
    per_device_train_batch_size: int = 12
    num_generations: int = 6
    states_per_forward: int = 12
    num_iterations: int = 2
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    beta: float = 1.0
    kl_in_reward: bool = False
    epsilon: float = 0.1
    clip: str = "one_sided"
    gamma: float = 1.0
    lam: float = 0.95
    value_learning_rate: float = 1e-4
    cliprange_value: float = 0.2
    value_batches: int = 40
    ref_model_sync_steps: int = 500
    max_completion_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    eval_steps: int = 10
    save_steps: int = 20
    seed: int = 0

    def validate(self) -> None:
        batch, group = self.per_device_train_batch_size, self.num_generations
        require(
            group >= 1 and batch >= 1 and batch % group == 0,
            f"num_generations={group}, per_device_train_batch_size={batch}: expected at least 1 "
            "completion a prompt, and a multiple of that",
        )
        for name in (
            "max_steps",
            "states_per_forward",
            "num_iterations",
            "ref_model_sync_steps",
            "eval_steps",
            "save_steps",
        ):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        require(self.value_batches >= 2, f"value_batches={self.value_batches}: expected 2 or more")
        for name in ("learning_rate", "value_learning_rate", "cliprange_value", "max_grad_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value}: expected a positive number")
        require(0 <= self.beta < math.inf, f"beta={self.beta}: expected 0 or more")
        require(0 < self.epsilon < 1, f"epsilon={self.epsilon}: expected (0, 1)")
        require(0 < self.gamma <= 1, f"gamma={self.gamma}: expected (0, 1]")
        require(0 <= self.lam <= 1, f"lam={self.lam}: expected [0, 1]")
        if self.clip not in CLIPS:
            raise unknown("clip", self.clip, CLIPS)
        self._sampler(self.block_length, 1.0)

    def sampler(self, policy: Policy, temperature: float = 1.0) -> SamplerConfig:
        """The sampler whose path is the episode; raises for a policy that cannot have one."""
        require(
            policy.kind in ("mdm", "bd"),
            f"a policy of kind {policy.kind!r} has no denoising steps to learn from: expected a "
            "masked or block diffusion policy",
        )
        own = policy.block_length
        require(
            own is None or self.block_length in (None, own),
            f"block_length={self.block_length}: this policy was trained with blocks of {own}",
        )
        return self._sampler(own or self.block_length, temperature)

    def _sampler(self, block_length: int | None, temperature: float) -> SamplerConfig:
        return SamplerConfig(
            max_new_tokens=self.max_completion_length,
            steps=self.steps,
            block_length=block_length,
            remasking="state_confidence",
            end_last=False,
            stop_at_end=False,
            temperature=temperature,
        )
