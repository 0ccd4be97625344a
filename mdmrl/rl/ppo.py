"""Block-level proximal policy optimisation of a policy that denoises (Schulman et al. 2017, PPO, on
the decision process of `mdmrl.rl.episodes`).

Completions are drawn and scored; step t of an episode reveals the positions U_t. With V(end) = 0,

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    A_t     = sum_k (gamma lam)^k delta_{t+k}                    (Schulman et al. 2016, GAE)
    rho_i   = exp(log p_i(x_i | s_t) - log p_i^old(x_i | s_t))   for every i in U_t

the policy maximises, over all L positions of a completion,

    1/L sum_t sum_{i in U_t} [ min(rho_i A_t, clip(rho_i, 1-eps, 1+eps) A_t) - beta KL_i ]

and V minimises a clipped squared error to the lambda-returns A_t + V(s_t).

Deviations from the cited algorithm, and what the thesis leaves open:
 * The ratio is one position's, with the advantage of its step, and the sum is divided by the
   constant L, never by |U_t|. U_t is a function of the state: where the new policy would choose
   otherwise (`selection_drift`), the ratio does not say so.
 * r_t is 0 before the last step, but for `half_text`. Advantages are normalised over all episodes
   and steps.
 * KL_i is KL(pi || pi_ref) at a revealed position over the whole vocabulary. As a loss it leaves
   out that the policy decides which states are visited. `kl_in_reward` adds that part: step t is
   also charged beta times its state's KL, and the loss keeps the part that no reward carries, on
   the scale of the advantages; both together follow the gradient of E[r] - beta KL(paths).
 * V is linear in detached features and fitted to base rollouts, in closed form, before the first
   update, where no KL is charged yet; then it takes gradient steps as the policy does.
 * The reference is the starting policy (of LoRA the model without its adapter), replaced every
   `ref_model_sync_steps` updates.
 * The batch of a step is one minibatch. Dropout is off in scoring. An update whose loss or
   gradient is not finite is skipped and counted; several in a row end the run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import (
    OldPolicyScores,
    finished_greedily,
    kl_divergence,
    log_probabilities,
    score_episodes,
    score_states,
)
from mdmrl.rl.gradients import Gradients, token_metrics
from mdmrl.rl.objectives import clipped_gain
from mdmrl.rl.rounds import Rounds
from mdmrl.rl.scoring import TOLERANCE
from mdmrl.rl.values import (
    ValueData,
    ValueHead,
    base_states,
    explained_variance,
    fit,
    gae,
    in_halves,
    normalised,
    value_loss,
)
from mdmrl.training.loop import Metrics, mean_count, require_kinds

ALGORITHM = "ppo-3"  # part of a run's identity: raise it when results change


def ppo_loss(
    logp: Tensor,
    old: Tensor,
    kl: Tensor,
    advantages: Tensor,
    counted: Tensor,
    beta: float,
    config: PPOConfig,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The two parts of the loss, summed over tokens and divided by L, and per-token quantities.

    All are of the revealed tokens, (N,): log-probabilities `logp` and `old`, `kl`, whose weight is
    `beta`, `advantages` and `counted`. Returns surrogate and beta * KL, scalars to be divided by
    the number of completions; and `ratio` and `clipped`.
    """
    ratio = (logp - old).exp()
    gain, clipped = clipped_gain(ratio, advantages, logp, config)
    surrogate = -gain[counted].sum() / config.max_completion_length
    # An infinite KL must not reach a loss that does without it: 0 * inf is nan.
    charged = beta * kl[counted].sum() / config.max_completion_length if beta else torch.zeros(())
    return surrogate, charged, {"ratio": ratio.detach(), "clipped": clipped}


def train_ppo(
    policy: Policy,
    rewards: Sequence[Callable],
    rows: Sequence[dict],
    config: PPOConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
    probe: Callable[[Policy], dict[str, float]] | None = None,
    watch: Callable | None = None,
    draw: Callable | None = None,
) -> Path:
    """Train `policy` in place, and a value function with it; returns the run's folder.

    Takes, resumes, logs and shares the work as `train_grpo`; `draw` must record a trajectory, of
    the same steps for every completion, as `mdmrl.sampling.pipeline.Pipeline` does. The value head
    lies beside the policy in the last checkpoint, `checkpoints/step-NNNNNN/values`, for
    `ValueHead.from_pretrained`.

    Beyond GRPO's, each row of `metrics.jsonl` holds `values/explained_variance` of V on states it
    has not seen (before the update; `values/base_explained_variance` on base rollouts, in the first
    fit's cross-validation), `values/loss`, `values/mean`, `advantages/std` before normalisation,
    `max_logprob_mismatch`: the largest difference between a log-probability and the sampler's own,
    `selection_drift`: the share of states where the policy would now reveal other positions, at
    the last inner step; with `half_text` `halfway`, the mean reward of half texts that are finished
    greedily. The first row's `token_forwards` count V's first fit too.

    Raises:
        InputError: an autoregressive policy, blocks it was not trained with, bad input.
        RuntimeError: new, old and reference policy, which are still the same, score differently.
        FloatingPointError: several updates in a row that are not finite.
    """
    require_kinds(policy, config, PPOConfig)
    said = f"half_text={config.half_text} with a draw of its own: expected False, a whole canvas"
    require(draw is None or not config.half_text, said)
    sampler = config.sampler_for(policy)
    rounds = Rounds(policy, rewards, rows, config, eval_rows, metric, probe, watch, draw)
    values = ValueHead(policy.model.config.hidden_size).to(policy.device)
    parameters = policy.trainable_parameters()
    groups = [
        {"params": [*parameters.values()], "lr": config.learning_rate},
        {"params": [*values.parameters()], "lr": config.value_learning_rate},
    ]
    charge = config.beta if config.kl_in_reward else 0.0

    def first_fit() -> float:
        base = base_states(policy, rounds.rewards, rounds.rows, config, *rounds.share, draw)
        return fit(values, ValueData.joined(list(base)), rounds.accelerator)

    def make_update(step: int) -> tuple[Metrics, dict]:
        before = policy.positions_computed
        batch, rollout, metrics, sample = rounds.collect(step, sampler, record=True)
        old = score_episodes(policy, rollout, config.states_per_forward, config.needs_reference)
        if step == 0:  # V first, on as many different prompts as there are completions
            already = policy.positions_computed
            metrics["values/base_explained_variance"] = first_fit()
            metrics["token_forwards"] += policy.positions_computed - already

        counted, gains = rollout.counted, old.rewards(charge)  # (B,), (B, T)
        with torch.no_grad():
            predicted = values(old.features)  # (B, T)
        advantages = gae(gains, predicted, config.gamma, config.lam)
        returns = advantages + predicted
        if config.half_text:
            finished = finished_greedily(policy, rollout)
            halfway = rounds.judge(batch, finished).nan_to_num(0).to(gains)
            metrics["halfway"] = halfway.mean().item()
            metrics["token_forwards"] += finished.token_forwards
            advantages = in_halves(gains, predicted, halfway, config.gamma, config.lam)
        advantages, divisor = normalised(advantages, counted, rounds.accelerator)
        beta = config.beta / divisor if config.kl_in_reward else config.beta
        outcome = gae(gains, torch.zeros_like(gains), config.gamma, 1.0)
        metrics |= {
            "values/explained_variance": explained_variance(predicted[counted], outcome[counted]),
            "values/mean": predicted.mean().item(),
            "advantages/std": divisor,
            "max_logprob_mismatch": old.max_logprob_mismatch,
        }
        for iteration in range(config.num_iterations):
            found = update(policy, old, advantages, beta, parameters, config)
            if iteration == 0:
                synced = step % config.ref_model_sync_steps == 0
                check_first_inner_step(found, synced and (step > 0 or not policy.uses_lora))
            now = values(old.features)
            loss = value_loss(now, predicted, returns, counted, config.cliprange_value)
            loss.backward()
            metrics |= found | rounds.take_step(found["loss"], step, batch)
            metrics["values/loss"] = loss.item()
        done = policy.positions_computed - before
        metrics["token_forwards/scoring"] = done - metrics["token_forwards"]
        return metrics, sample

    return rounds.train(ALGORITHM, groups, make_update, values)


def update(
    policy: Policy,
    old: OldPolicyScores,
    advantages: Tensor,
    beta: float,
    parameters: dict[str, Tensor],
    config: PPOConfig,
) -> dict[str, float]:
    """Set the gradient of the policy's loss, micro-batch by micro-batch; returns its metrics. The
    `advantages` are those of every step, (B, T), and `beta` is the KL's weight in the loss."""
    gradients = Gradients(policy, parameters, config.log_gradients)
    completions = mean_count(int(old.rollout.counted.sum()))
    tokens: dict[str, list[Tensor]] = {}

    def learn_from(index: int) -> None:
        rows, steps = old.parts[index]
        part = old.rollout.select(rows)
        states = score_states(policy, part, steps)
        at = states.revealed  # (R, S, K), N of them True
        logp = log_probabilities(policy, states.block[at])  # (N, V)
        drawn = states.drawn(logp)
        found, kl = {}, torch.zeros_like(drawn)
        if config.needs_reference:
            with policy.reference():
                ref = log_probabilities(policy, old.reference[index])
            kl = kl_divergence(logp, ref)
            found = {"kl": kl.detach(), "d": (drawn - states.drawn(ref)).detach()}
        gains = advantages[rows, steps, None], part.counted[:, None, None]
        gains = (x.expand(at.shape)[at] for x in gains)
        surrogate, charged, ratio = ppo_loss(drawn, old.logp[index], kl, *gains, beta, config)
        gradients.add(surrogate / completions, charged / completions)
        found |= ratio | {"drift": states.selection_changed(policy, logp)}
        for name, value in found.items():
            tokens.setdefault(name, []).append(value.flatten())

    with policy.together():
        for index in range(len(old.parts)):
            learn_from(index)  # a function of its own, so that its graph is freed before the next
    found = {name: torch.cat(values) for name, values in tokens.items()}
    drift = {"selection_drift": found["drift"].float().mean().item()}
    return gradients.finish() | token_metrics(found, len(old.rollout)) | drift


def check_first_inner_step(found: dict[str, float], synced: bool) -> None:
    """Before any update the policy is the old one, and right after a sync its own reference."""
    off = max(found["ratio/max"] - 1, 1 - found["ratio/min"])
    kl = found.get("kl/max", 0.0) if synced else 0.0
    if off > TOLERANCE or kl > TOLERANCE:
        raise RuntimeError(
            f"before any update the ratio is {off:.1e} off 1 and the KL reaches {kl:.1e}, where "
            "both must vanish: the network scores the same states differently (dropout? kernels "
            "that are not deterministic? a reference that was set by hand?)"
        )
