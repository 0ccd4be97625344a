"""Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, algorithm 1), also with the
losses of later papers: `GRPOConfig.loss_type` and the options beside it, in `mdmrl.rl.objectives`.

For each prompt a group of G completions is drawn from pi_old and scored; with

    A_i    = (r_i - mean r) / (std r + 1e-4)                    within the group, ddof 1
    rho_ik = exp(log pi(o_ik) - log pi_old(o_ik))
    d_ik   = log pi(o_ik) - log pi_ref(o_ik)

the policy maximises

    mean_i 1/|o_i| sum_k [ min(rho_ik A_i, clip(rho_ik, 1-eps, 1+eps) A_i) - beta KL(d_ik) ].

Deviations from the cited algorithm:
 * log pi is whatever `logp_estimator` names (`mdmrl.rl.logprobs`); for a masked diffusion model it
   is an estimate, with the same noise for new, old and reference policy at one inner iteration.
 * An estimator of log pi(o_i) as a whole makes one token of each completion, in the log too:
   rho_i = exp((log pi(o_i) - log pi_old(o_i)) / |o_i|), as Ou et al. 2025 (ESPO), d_i likewise.
 * The reference is the starting policy (of LoRA the model without its adapter), replaced by the
   policy every `ref_model_sync_steps` updates (the thesis's "every 500 rounds"), not once an outer
   iteration.
 * With `target_kl` beta changes from update to update (`mdmrl.rl.scoring.adapted`).
 * Dropout is off in scoring, new policy included: the ratio is 1 at the first inner step, which the
   first updates of a run check.
 * Rewards are outcome rewards without a trained reward model, so there is no algorithm line 10.
 * The gradient is clipped to `max_grad_norm`, and an update whose loss or gradient is not finite
   is skipped and counted; several in a row end the run (`mdmrl.training.loop`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mdmrl.policies import Policy
from mdmrl.rl.config import RATIO_FREE, GRPOConfig
from mdmrl.rl.gradients import Gradients, token_metrics
from mdmrl.rl.logprobs import Noise, draw_noise, estimator
from mdmrl.rl.objectives import divisor, grpo_loss, sandwiched, wd1_weights
from mdmrl.rl.rollout import Rollout
from mdmrl.rl.rounds import Rounds
from mdmrl.rl.scoring import adapted, charged, check_ratio, score_in_parts
from mdmrl.sampling import generate
from mdmrl.training.loop import Metrics, averaged, require_kinds

ALGORITHM = "grpo-1"  # part of a run's identity: raise it when its law changes
CHECKED = 2  # updates whose ratio is checked: fresh LoRA is 0 at the first, dropout unseen


def train_grpo(
    policy: Policy,
    rewards: Sequence[Callable],
    rows: Sequence[dict],
    config: GRPOConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
    probe: Callable[[Policy], dict[str, float]] | None = None,
    draw: Callable = generate,
    watch: Callable | None = None,
) -> Path:
    """Train `policy` in place; returns the run's folder.

    A run that was cut off resumes from its last checkpoint and gives the same bits as one that was
    not; of a complete one the final weights are loaded, and with a higher `max_steps` it goes on.
    On several processes (`docs/training.md`) each takes its share of the prompts.

    Args:
        rewards: functions of TRL's signature; their weighted sum is the reward.
        rows: training rows with `prompt` and the columns that rewards take.
        eval_rows, metric: held-out rows and the true metric, `metric(completion, row) -> bool`.
        probe: what else to measure of the policy whenever `eval_rows` are completed.
        draw: what completes prompts, called as `generate` is, such as `Hierarchical`.
        watch: what to watch in completions, see `Task.watch`.

    `docs/training.md` says what each row of `metrics.jsonl` holds. `eval/...` are greedy
    completions of `eval_rows`, before the update of that step; the last row has nothing else.

    Raises:
        InputError: an estimator that is not for this policy or loss, bad rewards or rows, rewards
            that abstain from every completion of several updates.
        RuntimeError: new and old policy, which are still the same, score differently.
        FloatingPointError: several updates in a row that are not finite.
    """
    require_kinds(policy, config, GRPOConfig)
    plain = estimator(config.logp_estimator, policy)
    scorer = sandwiched(plain, config) if config.loss_type == "spg" else plain
    sampler = config.sampler_for(policy)
    if scorer.reads_on:
        sampler = sampler.replace(stop_at_end=False)
    judging = {name: getattr(config, name) for name in ("reward_weights", "scale_rewards")}
    brought = policy, rewards, rows, config, eval_rows, metric, probe, watch, draw
    rounds = Rounds(*brought, **judging)
    parameters, unchecked = policy.trainable_parameters(), CHECKED
    group = {"params": [*parameters.values()], "lr": config.learning_rate}
    if config.target_kl:
        group["beta"] = config.beta  # kept with the optimizer's state

    def noise_for(rollout: Rollout, purpose: str, step: int, index: int = 0) -> Noise:
        how = scorer.samples, scorer.shared
        micro = rounds.micro_batches(len(rollout), purpose, step, index)
        parts = ((rollout.select(rows).narrowed(), random) for rows, random in micro)
        drawn = [draw_noise(part, config.p_mask_prompt, random, *how) for part, random in parts]
        return Noise.joined(drawn)

    def make_update(step: int) -> tuple[Metrics, dict]:
        nonlocal unchecked
        now, config = rounds.optimizer.adamw.param_groups[0], rounds.config
        config = config.replace(beta=now.get("beta", config.beta))
        batch, rollout, metrics, sample = rounds.collect(step, sampler, scorer.records)
        if config.mask_truncated_completions:
            ended = policy.is_end(rollout.completion_ids).any(1)
            rollout = replace(rollout, truncated=~ended)
        if scorer.records:
            rollout = rollout.whole()
        noises = [noise_for(rollout, "noise", step, i) for i in range(config.num_iterations)]
        if unchecked:
            unchecked -= 1
            check_ratio(policy, rollout, scorer, noises[0], config)
        before = policy.positions_computed
        if config.kl_in_reward:
            apart = noise_for(rollout, "charge", step)  # the update's would correlate with it
            rollout, metrics["kl/charged"] = charged(policy, rollout, plain, apart, config)
        if config.loss_type == "wd1":
            rollout = replace(rollout, advantages=wd1_weights(rollout, config))
        olds = [None] * len(noises)
        if config.loss_type not in RATIO_FREE:
            olds[1:] = [score_in_parts(policy, rollout, scorer, n, config) for n in noises[1:]]
        for noise, old in zip(noises, olds, strict=True):
            metrics |= update(policy, rollout, scorer, noise, old, parameters, config)
            metrics |= rounds.take_step(metrics["loss"], step, batch)
        if config.target_kl:
            kl = averaged({"kl": metrics["kl"]})["kl"]
            metrics["beta"], now["beta"] = config.beta, adapted(config.beta, kl, config.target_kl)
        metrics["token_forwards/scoring"] = policy.positions_computed - before
        return metrics, sample

    return rounds.train(ALGORITHM, [group], make_update)


def update(
    policy: Policy,
    rollout: Rollout,
    scorer: Callable[[Policy, Rollout, Noise], Tensor],
    noise: Noise,
    old: Tensor | None,
    parameters: dict[str, Tensor],
    config: GRPOConfig,
) -> dict[str, float]:
    """Set the gradient of the loss, micro-batch by micro-batch; returns the update's metrics. `old`
    is None at the first inner step, where the old policy is the new one, and without a ratio."""
    gradients = Gradients(policy, parameters, config.log_gradients)
    whole = divisor(rollout, config)
    tokens: dict[str, list[Tensor]] = {}

    def learn_from(chosen: slice) -> None:
        part, shared, ref = rollout.select(chosen), noise.select(chosen), None
        logp = scorer(policy, part, shared)
        if config.needs_reference:
            with policy.reference():
                ref = scorer(policy, part, shared.reference or shared)
        before = logp.detach() if old is None else old[chosen]
        surrogate, kl, seen = grpo_loss(logp, before, ref, part, config)
        gradients.add(surrogate / whole, kl / whole)
        for name, value in seen.items():
            values = value[:, 0] if value.shape[1] == 1 else value[part.completion_mask]
            tokens.setdefault(name, []).append(values)

    with policy.together():
        for chosen in config.micro_batches(len(rollout)):
            learn_from(chosen)  # a function of its own, so that its graph is freed before the next
    seen = {name: torch.cat(values) for name, values in tokens.items()}
    return gradients.finish() | token_metrics(seen, len(rollout))
