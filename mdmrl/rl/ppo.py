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
 * r_t is 0 before the last step. Advantages are normalised over all episodes and steps.
 * KL_i is KL(pi || pi_ref) at a revealed position over the whole vocabulary. As a loss it leaves
   out that the policy decides which states are visited. `kl_in_reward` adds that part: step t is
   also charged beta times its state's KL, and the loss keeps the part that no reward carries, on
   the scale of the advantages; both together follow the gradient of E[r] - beta KL(paths).
 * V is linear in detached features and fitted to base rollouts, in closed form, before the first
   update, where no KL is charged yet; then it takes gradient steps as the policy does.
 * The reference is the starting policy (of LoRA the model without its adapter), replaced every
   `ref_model_sync_steps` updates.
 * The batch of a step is one minibatch. Dropout is off in scoring. An update whose loss or
   gradient is not finite is skipped and counted; `MAX_SKIPPED` in a row end the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies.base import Policy
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import Old, kl_divergence, log_probabilities, look, score
from mdmrl.rl.grpo import MAX_SKIPPED, PARTS, TOLERANCE, averaged, finish_gradient
from mdmrl.rl.objectives import clipped_gain
from mdmrl.rl.rollout import collect
from mdmrl.rl.values import (
    Seen,
    ValueHead,
    base_states,
    explained_variance,
    fit,
    gae,
    normalised,
    value_loss,
)
from mdmrl.runs import generator_for
from mdmrl.training.checkpoints import begin, restore, save
from mdmrl.training.data import draw_rows

ALGORITHM = "ppo-3"  # part of a run's hash: raise it when results change


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

    Args:
        logp, old: log-probabilities of revealed tokens under the new and old policy; kl,
            advantages, counted: of the same tokens, all (N,).
        beta: the KL's weight.
    Returns:
        surrogate and beta * KL, scalars to be divided by the number of completions; and `ratio`
        and `clipped`, each (N,).
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
) -> Path:
    """Train `policy` in place, and a value function with it; returns the run's folder.

    Takes, resumes, logs and shares the work as `train_grpo`. The value head lies beside the policy
    in the last checkpoint, `checkpoints/step-NNNNNN/values`, for `ValueHead.from_pretrained`.

    Beyond GRPO's, each row of `metrics.jsonl` holds `values/explained_variance` of V on states it
    has not seen (before the update; `values/base_explained_variance` on base rollouts, in the first
    fit's cross-validation), `values/loss`, `values/mean`, `advantages/std` before normalisation,
    `off_sampler`: the largest difference between a log-probability and the sampler's own,
    `selection_drift`: the share of states where the policy would now reveal other positions, at
    the last inner step. The first row's `token_forwards` count V's first fit too.

    Raises:
        ValueError: an autoregressive policy, blocks it was not trained with, bad input.
        RuntimeError: new, old and reference policy, which are still the same, score differently.
        FloatingPointError: `MAX_SKIPPED` updates in a row that are not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=policy.device.type == "cpu")
    rank, processes = accelerator.process_index, accelerator.num_processes
    sampler = config.sampler(policy)
    prompts = config.per_device_train_batch_size // config.num_generations
    run = begin(policy, rewards, rows, eval_rows, config, ALGORITHM, accelerator)
    values = ValueHead(policy.model.config.hidden_size).to(policy.device)
    parameters, judge = policy.trainable_parameters(), dict(values.named_parameters())
    groups = [
        {"params": [*parameters.values()], "lr": config.learning_rate},
        {"params": [*judge.values()], "lr": config.value_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    charge = config.beta if config.kl_in_reward else 0.0
    first, skipped = restore(run, policy, optimizer, values), 0
    if run.complete(config.max_steps) and first == config.max_steps:
        return run.folder
    accelerator.wait_for_everyone()  # before the log that `complete` reads is cut
    if accelerator.is_main_process:
        run.rewind(first)

    def held_out() -> dict[str, float]:
        greedy = config.sampler(policy, 0.0)
        found = evaluate(policy, eval_rows, greedy, rewards, metric, "eval/", watch=watch)
        return found | {f"eval/{k}": v for k, v in (probe(policy) if probe else {}).items()}

    for step in range(first, config.max_steps):
        metrics: dict[str, float] = {}
        if eval_rows and step % config.eval_steps == 0:
            metrics |= held_out()
        start, pushed = time.perf_counter(), policy.pushed
        batch = draw_rows(rows, prompts, step, rank, processes, config.seed)
        generator = generator_for(config.seed, "rollout", step, rank, policy.device)
        group = config.num_generations
        rollout, seen, sample = collect(
            policy, batch, rewards, group, sampler, generator, record=True, watch=watch
        )
        old = score(policy, rollout, config.states_per_forward)
        metrics |= seen
        if step == 0:  # V first, on as many different prompts as there are completions
            already = policy.pushed
            base = Seen.all(list(base_states(policy, rewards, rows, config, rank, processes)))
            metrics["values/base_explained_variance"] = fit(values, base, accelerator)
            metrics["token_forwards"] += policy.pushed - already

        counted, gains = old.rollout.counted, old.rewards(charge)  # (B,), (B, T)
        with torch.no_grad():
            before = values(old.features)  # (B, T)
        advantages = gae(gains, before, config.gamma, config.lam)
        returns = advantages + before
        advantages, divisor = normalised(advantages, counted, accelerator)
        beta = config.beta / divisor if config.kl_in_reward else config.beta
        outcome = gae(gains, torch.zeros_like(gains), config.gamma, 1.0)
        metrics |= {
            "values/explained_variance": explained_variance(before[counted], outcome[counted]),
            "values/mean": before.mean().item(),
            "advantages/std": divisor,
            "off_sampler": old.off_sampler,
        }
        for iteration in range(config.num_iterations):
            found = update(policy, old, advantages, beta, parameters, config)
            if iteration == 0:
                synced = step % config.ref_model_sync_steps == 0
                check_first_inner_step(found, synced and (step > 0 or not policy.uses_lora))
            now = values(old.features)
            loss = value_loss(now, before, returns, counted, config.cliprange_value)
            loss.backward()
            norms = [
                finish_gradient(x, accelerator, config.max_grad_norm) for x in (parameters, judge)
            ]
            finite = all(map(math.isfinite, [found["loss"], *norms]))
            if finite:
                optimizer.step()
            optimizer.zero_grad()
            skipped = 0 if finite else skipped + 1
            metrics |= found | {"grad_norm": norms[0], "skipped_updates": skipped}
            metrics["values/loss"] = loss.item()
            if skipped >= MAX_SKIPPED:
                raise FloatingPointError(
                    f"{skipped} updates in a row had a loss or gradient that is not finite, the "
                    f"last at step {step} on prompts {[row['prompt'] for row in batch]}: "
                    "lower learning_rate or beta"
                )
        if (step + 1) % config.ref_model_sync_steps == 0:
            policy.sync_reference()
        metrics["token_forwards/scoring"] = policy.pushed - pushed - metrics["token_forwards"]
        metrics["step_time"] = time.perf_counter() - start
        metrics = averaged(metrics, accelerator)
        if accelerator.is_main_process:
            run.log({"step": step, **metrics})
            run.log({"step": step, **sample}, "samples")
            if (step + 1) % config.save_steps == 0 or step + 1 == config.max_steps:
                save(run, policy, optimizer, step + 1, values)
    if accelerator.is_main_process:
        run.log({"step": config.max_steps, **(held_out() if eval_rows else {})})
    return run.folder


def update(
    policy: Policy,
    old: Old,
    advantages: Tensor,
    beta: float,
    parameters: dict[str, Tensor],
    config: PPOConfig,
) -> dict[str, float]:
    """Set the gradient of the policy's loss, micro-batch by micro-batch; returns its metrics.

    Args:
        advantages: of every step, (B, T); beta: the KL's weight in the loss.
    """
    gradients = {part: [torch.zeros_like(p) for p in parameters.values()] for part in PARTS}
    losses = dict.fromkeys(PARTS, 0.0)
    tokens: dict[str, list[Tensor]] = {}
    completions = max(1, int(old.rollout.counted.sum()))
    for (rows, steps), before, reference in zip(old.parts, old.logp, old.reference, strict=True):
        part = old.rollout.rows(rows)
        seen = look(policy, part, steps)
        at = seen.revealed  # (R, S, K), N of them True
        logp = log_probabilities(policy, seen.block[at])  # (N, V)
        with policy.reference():
            ref = log_probabilities(policy, reference)
        drawn, drawn_ref = (x.gather(1, seen.tokens[at][:, None])[:, 0] for x in (logp, ref))
        kl = kl_divergence(logp, ref)
        surrogate, charged, found = ppo_loss(
            drawn,
            before,
            kl,
            advantages[rows, steps, None].expand(at.shape)[at],
            part.counted[:, None, None].expand(at.shape)[at],
            beta,
            config,
        )
        found |= {"kl": kl.detach(), "d": (drawn - drawn_ref).detach()}
        found["drift"] = seen.selection_changed(policy, logp)
        for name, value in zip(PARTS, (surrogate, charged), strict=True):
            value = value / completions
            losses[name] += value.item()
            if not value.requires_grad:
                continue
            keep = name == "surrogate" and beta > 0  # the graph, for the other part
            slopes = torch.autograd.grad(value, [*parameters.values()], retain_graph=keep)
            for total, slope in zip(gradients[name], slopes, strict=True):
                total += slope
        for name, value in found.items():
            tokens.setdefault(name, []).append(value.flatten())
    for parameter, *both in zip(parameters.values(), *gradients.values(), strict=True):
        parameter.grad = sum(both)
    ratio, clipped, kl, d, drift = (torch.cat(values) for values in tokens.values())
    return {
        "loss": sum(losses.values()),
        **{f"loss/{name}": value for name, value in losses.items()},
        "kl": kl.mean().item(),
        "kl/sum": kl.sum().item() / len(old.rollout),
        "kl/max": kl.max().item(),
        "kl/law": (torch.logsumexp(-d, 0) - math.log(len(d))).item(),
        **{f"grad_norm/{name}": get_total_norm(gradients[name]).item() for name in PARTS},
        "ratio/mean": ratio.mean().item(),
        "ratio/min": ratio.min().item(),
        "ratio/max": ratio.max().item(),
        "clip_ratio": clipped.float().mean().item(),
        "selection_drift": drift.float().mean().item(),
    }


def check_first_inner_step(found: dict[str, float], synced: bool) -> None:
    """Before any update the policy is the old one, and right after a sync its own reference."""
    off = max(found["ratio/max"] - 1, 1 - found["ratio/min"])
    kl = found["kl/max"] if synced else 0.0
    if off > TOLERANCE or kl > TOLERANCE:
        raise RuntimeError(
            f"before any update the ratio is {off:.1e} off 1 and the KL reaches {kl:.1e}, where "
            "both must vanish: the network scores the same states differently (dropout? kernels "
            "that are not deterministic? a reference that was set by hand?)"
        )
