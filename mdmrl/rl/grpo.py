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
 * Dropout is off in scoring, new policy included: the ratio is 1 at the first inner step, which the
   first updates of a run check.
 * Rewards are outcome rewards without a trained reward model, so there is no algorithm line 10.
 * The gradient is clipped to `max_grad_norm`, and an update whose loss or gradient is not finite
   is skipped and counted; `MAX_SKIPPED` in a row end the run.
 * The gradients of the two parts of the loss are taken apart, so that their norms can be logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies.base import Policy
from mdmrl.rl.config import RATIO_FREE, GRPOConfig
from mdmrl.rl.logprobs import Noise, draw_noise, estimator
from mdmrl.rl.objectives import charge, divisor, grpo_loss, of_tokens, sandwiched, wd1_weights
from mdmrl.rl.rollout import Rollout, collect, group_advantages
from mdmrl.runs import generator_for
from mdmrl.sampling import generate
from mdmrl.training.checkpoints import begin, known_as, restore, save
from mdmrl.training.data import draw_rows

ALGORITHM = "grpo-1"  # part of a run's hash: raise it when its law changes
MAX_SKIPPED = 5
PARTS = ("surrogate", "kl")
CHECKED = 2  # steps of which the ratio is checked: fresh LoRA is 0 at the first, dropout unseen
TOLERANCE = 1e-5  # of what must be 1 or 0 at the first inner step


def train_grpo(
    policy: Policy,
    rewards: Sequence[Callable],
    rows: Sequence[dict],
    config: GRPOConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
    probe: Callable[[Policy], dict[str, float]] | None = None,
    draw: Callable = generate,
) -> Path:
    """Train `policy` in place; returns the run's folder.

    A run that was cut off resumes from its last checkpoint and gives the same bits as one that was
    not; of a complete one the final weights are loaded. On several processes (`accelerate launch`)
    each takes its share of the prompts.

    Args:
        rewards: functions of TRL's signature; their sum is the reward.
        rows: training rows with `prompt` and the columns that rewards take.
        eval_rows, metric: held-out rows and the true metric, `metric(completion, row) -> bool`.
        probe: what else to measure of the policy whenever `eval_rows` are completed.
        draw: what completes prompts, called as `generate` is, such as `Hierarchical`.

    Each row of `metrics.jsonl` holds the reward and its components; `loss` and its parts
    `loss/surrogate` and `loss/kl` (beta KL), their gradient norms, `grad_norm` before clipping;
    `kl` (mean over tokens, without beta), `kl/sum` (over a completion), `kl/max` and `kl/law` =
    log mean exp(-d), which is 0 where samples come from the distribution that is scored; ratio and
    clip fraction, where the loss has a ratio; with `kl_in_reward` the mean `kl/charged`; what
    completions look like (`mdmrl.evaluation.completions`); seconds; positions that sampling pushed
    through the network, `token_forwards`, and what followed, `token_forwards/scoring`. `eval/...` are
    greedy completions of `eval_rows`, before the update of that step; the last row has nothing else.

    Raises:
        ValueError: an estimator that is not for this policy or loss, bad input.
        RuntimeError: new and old policy, which are still the same, score differently.
        FloatingPointError: `MAX_SKIPPED` updates in a row that are not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=policy.device.type == "cpu")
    rank, processes = accelerator.process_index, accelerator.num_processes
    plain = estimator(config.logp_estimator, policy)
    scorer = sandwiched(plain, config) if config.loss_type == "spg" else plain
    sampler = config.sampler().replace(stop_at_end=not scorer.reads_on)
    drawn = {} if draw is generate else {"draw": known_as(draw)}
    run = begin(policy, rewards, rows, eval_rows, config, ALGORITHM, accelerator, **drawn)
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

    def noise_for(rollout: Rollout, purpose: str, step: int, index: int = 0) -> Noise:
        random = generator(purpose, step, index)
        return draw_noise(rollout, config.p_mask_prompt, random, scorer.samples, scorer.shared)

    def held_out() -> dict[str, float]:
        greedy = config.sampler(greedy=True)
        found = evaluate(policy, eval_rows, greedy, rewards, metric, "eval/", draw=draw)
        return found | {f"eval/{k}": v for k, v in (probe(policy) if probe else {}).items()}

    for step in range(first, config.max_steps):
        metrics: dict[str, float] = {}
        if eval_rows and step % config.eval_steps == 0:
            metrics |= held_out()
        start = time.perf_counter()
        batch = draw_rows(rows, config.prompts_per_process, step, rank, processes, config.seed)
        random, group = generator("rollout", step), config.num_generations
        rollout, seen, sample = collect(
            policy, batch, rewards, group, sampler, random, scorer.records, draw
        )
        if scorer.records:
            rollout = rollout.whole()
        metrics |= seen
        noises = [noise_for(rollout, "noise", step, i) for i in range(config.num_iterations)]
        if step < first + CHECKED:
            check_ratio(policy, rollout, scorer, noises[0], config)
        pushed = policy.pushed
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
        metrics["token_forwards/scoring"] = policy.pushed - pushed
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


def charged(
    policy: Policy, rollout: Rollout, scorer: Callable, noise: Noise, config: GRPOConfig
) -> tuple[Rollout, float]:
    """The rollout with advantages of r_i less its KL's charge, and the mean charge."""
    logp = score_in_parts(policy, rollout, scorer, noise, config)
    with policy.reference():
        ref = score_in_parts(policy, rollout, scorer, noise.reference or noise, config)
    cost = charge(logp, ref, rollout, config)
    advantages, _ = group_advantages(rollout.rewards - cost.cpu(), config.num_generations)
    return replace(rollout, advantages=advantages.to(cost.device)), cost.mean().item()


def check_ratio(
    policy: Policy, rollout: Rollout, scorer: Callable, noise: Noise, config: GRPOConfig
) -> None:
    """Before an update the new policy, scored as `update` does, must be the old one, scored as
    `score_in_parts` does: a ratio off 1 by more than `TOLERANCE` is a RuntimeError."""
    part = micro_batches(rollout, config)[0]
    rollout, noise = rollout.rows(part), noise.rows(part)
    both = scorer(policy, rollout, noise), score_in_parts(policy, rollout, scorer, noise, config)
    new, old = (of_tokens(x.detach(), rollout.completion_mask).flatten() for x in both)
    off = ((new - old).exp() - 1).abs()
    worst = off.argmax()
    if off[worst] > TOLERANCE:  # one that is not a number is for the update to find
        raise RuntimeError(
            f"before any update the new policy gives a log-probability of {new[worst]:.7g} where "
            f"the old one gives {old[worst]:.7g}, a ratio {off[worst]:.1e} off 1: the network "
            "scores the same tokens differently (dropout that is on? other masks? another "
            "attention, or kernels that are not deterministic?)"
        )


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

    `old`, (B, L) or (B,), is None at the first inner step, where the old policy is the new one, and
    where there is no ratio.
    """
    gradients = {part: [torch.zeros_like(p) for p in parameters.values()] for part in PARTS}
    losses = dict.fromkeys(PARTS, 0.0)
    tokens: dict[str, list[Tensor]] = {}
    whole = divisor(rollout, config)
    for chosen in micro_batches(rollout, config):
        part, shared = rollout.rows(chosen), noise.rows(chosen)
        logp = scorer(policy, part, shared)
        with policy.reference():
            ref = scorer(policy, part, shared.reference or shared)
        before = logp.detach() if old is None else old[chosen]
        surrogate, kl, seen = grpo_loss(logp, before, ref, part, config)
        for name, value in zip(PARTS, (surrogate / whole, kl / whole), strict=True):
            losses[name] += value.item()
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
            for total, gradient in zip(gradients[name], found, strict=True):
                total += gradient
        for name, value in seen.items():
            values = value[:, 0] if value.shape[1] == 1 else value[part.completion_mask]
            tokens.setdefault(name, []).append(values)
        del logp  # frees the graph that retain_graph kept
    for parameter, *both in zip(parameters.values(), *gradients.values(), strict=True):
        parameter.grad = sum(both)
    seen = {name: torch.cat(values) for name, values in tokens.items()}
    d, kl = seen["d"], seen["kl"]
    found = {
        "loss": sum(losses.values()),
        **{f"loss/{name}": value for name, value in losses.items()},
        "kl": kl.mean().item(),
        "kl/sum": kl.sum().item() / len(rollout),
        "kl/max": kl.max().item(),
        "kl/law": (torch.logsumexp(-d, 0) - math.log(len(d))).item(),
        **{f"grad_norm/{name}": _norm(gradients[name]) for name in PARTS},
    }
    if "ratio" in seen:
        found |= {
            "ratio/mean": seen["ratio"].mean().item(),
            "ratio/max": seen["ratio"].max().item(),
            "clip_ratio": seen["clipped"].float().mean().item(),
        }
    return found


def micro_batches(rollout: Rollout, config: GRPOConfig) -> list[slice]:
    size = config.per_device_train_batch_size
    return [slice(start, start + size) for start in range(0, len(rollout), size)]


def _norm(tensors: Sequence[Tensor]) -> float:
    """Of all together; in double where the device is sure to have it."""
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    squares = (t.double() if on_cpu else t for t in tensors)
    return math.sqrt(sum(t.square().sum().item() for t in squares))


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
