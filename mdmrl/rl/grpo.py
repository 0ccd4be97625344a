"""Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, algorithm 1).

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
   rho_i = exp((log pi(o_i) - log pi_old(o_i)) / |o_i|), and d_i likewise (Ou et al. 2025, ESPO).
 * The reference is the starting policy, replaced by the policy every `ref_model_sync_steps`
   updates (the thesis's "every 500 rounds"), not once an outer iteration.
 * Dropout is off in scoring, new policy included: the ratio is exactly 1 at the first inner step.
 * Rewards are outcome rewards without a trained reward model, so there is no algorithm line 10.
 * The gradient is clipped to `max_grad_norm`, and an update whose loss or gradient is not finite
   is skipped and counted; `MAX_SKIPPED` in a row end the run.
 * The gradients of the two parts of the loss are taken apart, so that their norms can be logged.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies.base import Policy
from mdmrl.rewards.score import reward_name
from mdmrl.rl.checkpoints import restore, save
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.kl import KL_ESTIMATORS
from mdmrl.rl.logprobs import Noise, draw_noise, estimator
from mdmrl.rl.rollout import Rollout, collect, draw_rows
from mdmrl.runs import Run, generator_for

ALGORITHM = "grpo-1"  # part of a run's hash: raise it when results change
MAX_SKIPPED = 5
PARTS = ("surrogate", "kl")


def grpo_loss(
    logp: Tensor, old: Tensor, ref: Tensor, rollout: Rollout, config: GRPOConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The two parts of the loss, summed over completions, and per-token quantities for the log.

    Args:
        logp, old, ref: log-probabilities under the new, old and reference policy, of tokens (B, L)
            or of completions (B,).
    Returns:
        surrogate and beta * KL, scalars to be divided by the number of completions; and `ratio`,
        `clipped`, `d`, `kl`, each (B, L) or, of completions, (B, 1).
    """
    mask, advantage = rollout.completion_mask, rollout.advantages[:, None]
    if logp.ndim == 1:
        logp, old, ref = ((x / mask.sum(1))[:, None] for x in (logp, old, ref))
        mask = torch.ones_like(logp, dtype=torch.bool)
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    d = logp - ref
    kl = KL_ESTIMATORS[config.kl_estimator](d)

    def over_completions(x: Tensor) -> Tensor:  # mean over tokens, sum over completions
        return ((x * mask).sum(1) / mask.sum(1) * rollout.counted).sum()

    tokens = {"ratio": ratio, "clipped": gain < ratio * advantage, "d": d, "kl": kl}
    return (
        -over_completions(gain),
        # An infinite KL must not reach a loss that does without it: 0 * inf is nan.
        config.beta * over_completions(kl) if config.beta else torch.zeros(()),
        {name: value.detach() for name, value in tokens.items()},
    )


def train_grpo(
    policy: Policy,
    rewards: Sequence[Callable],
    rows: Sequence[dict],
    config: GRPOConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
) -> Path:
    """Train `policy` in place; returns the run's folder.

    A run that was cut off resumes from its last checkpoint and gives the same bits as one that was
    not; of a complete one the final weights are loaded. On several processes (`accelerate launch`)
    each takes its share of the prompts.

    Args:
        rewards: functions of TRL's signature; their sum is the reward.
        rows: training rows with `prompt` and the columns that rewards take.
        eval_rows, metric: held-out rows and the true metric, `metric(completion, row) -> bool`.

    Each row of `metrics.jsonl` holds the reward and its components; `loss` and its parts
    `loss/surrogate` and `loss/kl` (beta KL), their gradient norms, `grad_norm` before clipping;
    `kl` (mean over tokens, without beta), `kl/sum` (over a completion), `kl/max` and `kl/law` =
    log mean exp(-d), which is 0 where samples come from the distribution that is scored;
    ratio, clip fraction, what completions look like (`mdmrl.rl.monitors`), seconds, and
    `token_forwards`, the positions that sampling pushed through the network. `eval/...` are greedy
    completions of `eval_rows`, before the update of that step; the last row has nothing else.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=policy.device.type == "cpu")
    rank, processes = accelerator.process_index, accelerator.num_processes
    scorer = estimator(config.logp_estimator, policy)
    names = [reward_name(reward) for reward in rewards]
    require(len(rows) > 0, "no training rows given")
    require(len(names) > 0, "no reward functions given")
    require(len(set(names)) == len(names), f"two rewards share a name: {names}")
    policy.encode([row["prompt"] for row in rows], config.max_completion_length)  # they all fit

    settings = {k: v for k, v in config.to_dict().items() if k != "output_dir"}
    identity = settings | {
        "algorithm": ALGORITHM,
        "policy": policy.fingerprint(),
        "rewards": names,
        "rows": hashlib.sha256(repr([*rows, *eval_rows]).encode()).hexdigest()[:10],
        "processes": processes,
    }
    with accelerator.main_process_first():
        run = Run(config.output_dir, identity)
    if not policy.uses_lora:
        policy.sync_reference()
    parameters = policy.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    first, skipped = restore(run, policy, optimizer), 0
    if run.complete(config.max_steps) and first == config.max_steps:
        return run.folder
    accelerator.wait_for_everyone()  # before the log that `complete` reads is cut
    if accelerator.is_main_process:
        run.rewind(first)

    def generator(purpose: str, step: int, index: int = 0) -> torch.Generator:
        return generator_for(config.seed, purpose, step, index * processes + rank, policy.device)

    def held_out() -> dict[str, float]:
        return evaluate(policy, eval_rows, config.sampler(0.0), rewards, metric, "eval/")

    for step in range(first, config.max_steps):
        metrics: dict[str, float] = {}
        if eval_rows and step % config.eval_steps == 0:
            metrics |= held_out()
        start = time.perf_counter()
        batch = draw_rows(rows, config.prompts_per_process, step, rank, processes, config.seed)
        rollout, seen, sample = collect(
            policy,
            batch,
            rewards,
            config.num_generations,
            config.sampler(),
            generator("rollout", step),
            scorer.records,
        )
        if scorer.records:
            rollout = rollout.whole()
        metrics |= seen
        noises = [
            draw_noise(
                rollout,
                config.p_mask_prompt,
                generator("noise", step, i),
                scorer.samples,
                scorer.shared,
            )
            for i in range(config.num_iterations)
        ]
        olds = [None, *(score_in_parts(policy, rollout, scorer, n, config) for n in noises[1:])]
        for noise, old in zip(noises, olds, strict=True):
            metrics |= update(policy, rollout, scorer, noise, old, parameters, config)
            norm = finish_gradient(parameters, accelerator, config.max_grad_norm)
            finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
            if finite:
                optimizer.step()
            optimizer.zero_grad()
            skipped = 0 if finite else skipped + 1
            metrics |= {"grad_norm": norm, "skipped_updates": skipped}
            if skipped >= MAX_SKIPPED:
                raise FloatingPointError(
                    f"{skipped} updates in a row had a loss or gradient that is not finite, the "
                    f"last at step {step} on prompts {[row['prompt'] for row in batch]}: "
                    "lower learning_rate or beta"
                )
        if (step + 1) % config.ref_model_sync_steps == 0:
            policy.sync_reference()
        metrics["step_time"] = time.perf_counter() - start
        metrics = averaged(metrics, accelerator)
        if accelerator.is_main_process:
            run.log({"step": step, **metrics})
            run.log({"step": step, **sample}, "samples")
            if (step + 1) % config.save_steps == 0 or step + 1 == config.max_steps:
                save(run, policy, optimizer, step + 1)
    if accelerator.is_main_process:
        run.log({"step": config.max_steps, **(held_out() if eval_rows else {})})
    return run.folder


@torch.no_grad()
def score_in_parts(
    policy: Policy, rollout: Rollout, scorer: Callable, noise: Noise, config: GRPOConfig
) -> Tensor:
    """Log-probabilities under the policy as it is, micro-batch by micro-batch, (B, L) or (B,)."""
    parts = micro_batches(rollout, config)
    return torch.cat([scorer(policy, rollout.rows(p), noise.rows(p)) for p in parts])


def update(
    policy: Policy,
    rollout: Rollout,
    scorer: Callable[[Policy, Rollout, Noise], Tensor],
    noise: Noise,
    old: Tensor | None,
    parameters: dict[str, Tensor],
    config: GRPOConfig,
) -> dict[str, float]:
    """Set the gradient of the loss, micro-batch by micro-batch; returns metrics of the update.

    `old`, (B, L) or (B,), is None at the first inner step, where the old policy is the new one.
    """
    gradients = {part: [torch.zeros_like(p) for p in parameters.values()] for part in PARTS}
    losses = dict.fromkeys(PARTS, 0.0)
    tokens: dict[str, list[Tensor]] = {}
    completions = max(1, int(rollout.counted.sum()))
    for chosen in micro_batches(rollout, config):
        part, shared = rollout.rows(chosen), noise.rows(chosen)
        logp = scorer(policy, part, shared)
        with policy.reference():
            ref = scorer(policy, part, shared.reference or shared)
        before = logp.detach() if old is None else old[chosen]
        surrogate, kl, seen = grpo_loss(logp, before, ref, part, config)
        for name, value in zip(PARTS, (surrogate / completions, kl / completions), strict=True):
            losses[name] += value.item()
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
            for total, gradient in zip(gradients[name], found, strict=True):
                total += gradient
        for name, value in seen.items():
            values = value[part.completion_mask] if logp.ndim == 2 else value[:, 0]
            tokens.setdefault(name, []).append(values)
        del logp  # frees the graph that retain_graph kept
    for parameter, *both in zip(parameters.values(), *gradients.values(), strict=True):
        parameter.grad = sum(both)
    ratio, clipped, d, kl = (torch.cat(tokens[n]) for n in ("ratio", "clipped", "d", "kl"))
    return {
        "loss": sum(losses.values()),
        **{f"loss/{name}": value for name, value in losses.items()},
        "kl": kl.mean().item(),
        "kl/sum": kl.sum().item() / len(rollout),
        "kl/max": kl.max().item(),
        "kl/law": (torch.logsumexp(-d, 0) - math.log(len(d))).item(),
        **{f"grad_norm/{name}": _norm(gradients[name]) for name in PARTS},
        "ratio/mean": ratio.mean().item(),
        "ratio/max": ratio.max().item(),
        "clip_ratio": clipped.float().mean().item(),
    }


def micro_batches(rollout: Rollout, config: GRPOConfig) -> list[slice]:
    size = config.per_device_train_batch_size
    return [slice(start, start + size) for start in range(0, len(rollout), size)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def finish_gradient(parameters: dict[str, Tensor], accelerator, max_norm: float) -> float:
    """Average the gradient over processes and clip it; returns its norm before clipping."""
    for parameter in parameters.values():
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm).item()


def averaged(metrics: dict[str, float], accelerator) -> dict[str, float]:
    """Metrics of this process averaged over all of them."""
    if accelerator.num_processes == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(metrics, accelerator.reduce(values, "mean").tolist(), strict=True))
