"""Direct preference optimisation (Rafailov et al. 2023, DPO): learning from pairs.

The chosen completion o+ of a prompt is made more probable than the rejected o-. With

    r(o) = beta [log pi(o) - log pi_ref(o)],    m = r(o+) - r(o-)

the policy minimises the mean over pairs of Bradley and Terry's -log sigmoid(m), or of (m / beta -
1 / (2 beta))^2 (Azar et al. 2024, `ipo`). The reference is the starting policy (of LoRA the model
without its adapter).

 * Of a policy that denoises log pi is an estimate, by default of the ELBO from 8 samples (Zhu et
   al. 2025, LLaDA 1.5, VRPO). Policy and reference are scored under the same noise, drawn anew each
   update (`elbo-8-unshared`: each under its own); o+ and o-, two texts, under noise of their own.
 * Dropout is off. An update whose loss or gradient is not finite is skipped and counted; several in
   a row end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies import Policy
from mdmrl.rewards.protocol import require_prompts
from mdmrl.rl.config import RLConfig
from mdmrl.rl.logprobs import Estimator, draw_noise, estimator
from mdmrl.rl.reward_models import bradley_terry_loss
from mdmrl.rl.rollout import Rollout
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig
from mdmrl.training.config import TrainingConfig
from mdmrl.training.data import listed, refuse_learnt, rows_of_step
from mdmrl.training.loop import (
    Metrics,
    Optimizer,
    accelerator_for,
    open_run,
    require_kinds,
    train,
)
from mdmrl.training.supervised import Pair, collate, encode_pairs, require_fields

ALGORITHM = "dpo-1"  # part of a run's identity: raise it when results change

LOSSES = {
    "sigmoid": lambda chosen, rejected, beta: bradley_terry_loss(chosen, rejected),
    "ipo": lambda chosen, rejected, beta: ((chosen - rejected) / beta - 1 / (2 * beta)).square(),
}


@dataclass
class DPOConfig(TrainingConfig):
    """Settings of `train_dpo`; `TrainingConfig` has those that all runs share.

    Attributes:
        per_device_train_batch_size: pairs of one forward.
        beta: how much a nat from the reference is worth.
        loss_type: `sigmoid` or `ipo`.
        logp_estimator: what log pi of a completion is, as in `GRPOConfig`; None is `exact`
            (autoregressive) or `elbo-8`.
        sampler: of the held-out prompts, which are completed greedily.
    """

    output_dir: str = "runs/dpo"
    per_device_train_batch_size: int = 4
    beta: float = 0.1
    loss_type: str = "sigmoid"
    logp_estimator: str | Callable | None = None

    POSITIVE: ClassVar = (*TrainingConfig.POSITIVE, "beta")
    NAMED: ClassVar = TrainingConfig.NAMED | {"loss_type": LOSSES}
    OWN_SAMPLER: ClassVar = RLConfig.OWN_SAMPLER

    def estimator_for(self, policy: Policy) -> str | Callable:
        return self.logp_estimator or ("elbo-8" if policy.denoises else policy.logp_estimator)

    def settings_for(self, policy: Policy) -> dict:
        return super().settings_for(policy) | {"logp_estimator": self.estimator_for(policy)}


def train_dpo(
    policy: Policy,
    rows: Sequence[dict],
    config: DPOConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
    watch: Callable | None = None,
) -> Path:
    """Train `policy` in place on rows with `prompt`, `chosen` and `rejected`, strings or message
    lists; returns the run's folder.

    Takes, resumes and shares the work as `train_grpo`. Each row of `metrics.jsonl` has TRL's names:
    `loss`, `rewards/chosen`, `/rejected`, `/accuracies` and `/margins`, r(o) and m above,
    `logps/chosen` and `/rejected` in nats. `eval/...` are the same of those `eval_rows` that are
    pairs, under the same noise every time, and with a `metric` of greedy completions.

    Raises:
        InputError: no pairs, one that does not fit (see `encode_pairs`), an estimator that needs
            the steps in which a text was drawn, a held-out prompt among the training rows.
        FloatingPointError: several updates in a row that are not finite.
    """
    require_kinds(policy, config, DPOConfig)
    scorer = estimator(config.estimator_for(policy), policy)
    require(
        not scorer.records,
        f"logp_estimator={config.logp_estimator!r} scores the steps in which a text was drawn, and "
        "pairs have none: expected another, such as 'elbo-8'",
    )
    rows, eval_rows = listed(rows), listed(eval_rows, "eval_rows")
    length = config.max_completion_length
    pairs = encode_preferences(policy, rows, length)
    require_prompts(eval_rows)
    judged = [row for row in eval_rows if "chosen" in row]
    others = len(eval_rows) - len(judged)
    said = f"{others} of {len(eval_rows)} eval_rows are no pairs, and there is no metric of texts"
    require(metric is not None or not others, f"{said}: expected chosen and rejected, or a metric")
    held_out_pairs = encode_preferences(policy, judged, length)
    refuse_learnt(rows, eval_rows)
    accelerator = accelerator_for(policy)
    share = accelerator.process_index, accelerator.num_processes
    parameters = [*policy.trainable_parameters().values()]

    def held_out(step: int) -> Metrics:
        found = {}
        if held_out_pairs:
            noise = generator_for(config.seed, "held-out", device=policy.device)
            with torch.no_grad():
                found = means(list(losses(policy, held_out_pairs, scorer, noise, config)))
        if metric is not None:
            sampler = config.sampler_for(policy, greedy=True)
            how = {"batch_size": config.per_device_eval_batch_size, "watch": watch}
            found |= evaluate(policy, eval_rows, sampler, (), metric, **how)
        return {f"eval/{name}": value for name, value in found.items()}

    def make_update(step: int) -> tuple[Metrics, None]:
        drawn = rows_of_step(pairs, config.batch, step, *share, config.seed)
        noise = generator_for(config.seed, "noise", step, share[0], policy.device)
        before, seen = policy.positions_computed, []
        for part in losses(policy, drawn, scorer, noise, config):
            policy.backward(part["loss"].sum() / len(drawn), parameters)
            seen.append({name: value.detach() for name, value in part.items()})
        metrics = means(seen)
        asked = policy.tokenizer.batch_decode([prompt for (prompt, _), _ in drawn])
        metrics |= optimizer.step(metrics["loss"], f"step {step} on prompts {asked}")
        return metrics | {"token_forwards/scoring": policy.positions_computed - before}, None

    parts = {"eval_rows": eval_rows, "metric": metric, "watch": watch}
    with open_run(policy, rows, config, ALGORITHM, accelerator, **parts) as run:
        if not policy.uses_lora:
            policy.sync_reference()
        groups = [{"params": parameters, "lr": config.learning_rate}]
        optimizer = Optimizer(policy, groups, accelerator, config.max_grad_norm)
        train(policy, run, config, optimizer, make_update, held_out if eval_rows else None)
        return run.folder


def encode_preferences(policy: Policy, rows: Sequence[dict], length: int) -> list[tuple]:
    """Token ids of the chosen and of the rejected text of each row; see `encode_pairs`."""
    require_fields(rows, "prompt", "chosen", "rejected")
    for number, row in enumerate(rows, start=1):
        same = f"row {number} has the same text as chosen and as rejected, {row['chosen']!r:.80}"
        require(row["chosen"] != row["rejected"], f"{same}: expected two texts, or leave it out")
    sides = (
        encode_pairs(policy, [row | {"completion": row[side]} for row in rows], length)
        for side in ("chosen", "rejected")
    )
    return list(zip(*sides, strict=True))


def losses(
    policy: Policy,
    pairs: Sequence[tuple[Pair, Pair]],
    scorer: Estimator,
    generator: torch.Generator,
    config: DPOConfig,
) -> Iterator[dict[str, Tensor]]:
    """What `dpo_loss` says of `pairs`, micro-batch by micro-batch."""
    rollout = rollout_of(policy, list(chain(*pairs)), config.max_completion_length)
    noise = draw_noise(rollout, 0.0, generator, scorer.samples, scorer.shared)
    with policy.together():
        for part in config.micro_batches(len(pairs)):
            both = slice(2 * part.start, 2 * part.stop)
            shown, shared = rollout.select(both), noise.select(both)
            logp = of_texts(scorer(policy, shown, shared))
            with policy.reference():
                ref = of_texts(scorer(policy, shown, shared.reference or shared))
            yield dpo_loss(logp, ref, config)


def dpo_loss(logp: Tensor, ref: Tensor, config: DPOConfig) -> dict[str, Tensor]:
    """`loss` of N pairs and what TRL logs of them, (N,) each, from log-probabilities of texts under
    policy and reference, (2N,): each chosen one and behind it the rejected."""
    logps, rewards = (x.unflatten(0, (-1, 2)).T for x in (logp, config.beta * (logp - ref)))
    margin = rewards[0] - rewards[1]
    sides = {"chosen": 0, "rejected": 1}.items()
    return {
        "loss": LOSSES[config.loss_type](*rewards, config.beta),
        **{f"rewards/{name}": rewards[side] for name, side in sides},
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "rewards/margins": margin,
        **{f"logps/{name}": logps[side] for name, side in sides},
    }


def of_texts(logp: Tensor) -> Tensor:
    """Log-probabilities of texts, (B,), from those of their tokens, (B, L), or of texts."""
    return logp.sum(1) if logp.ndim == 2 else logp


def means(parts: Sequence[dict[str, Tensor]]) -> Metrics:
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def rollout_of(policy: Policy, texts: Sequence[Pair], length: int) -> Rollout:
    """Prompts and completions as if they had been drawn at temperature 1."""
    canvas = length if policy.denoises else max(len(completion) for _, completion in texts)
    batch = collate(texts, canvas, policy.tokenizer.eos_token_id).to(policy.device)
    width = batch.input_ids.shape[1] - canvas
    sides = (batch.input_ids, batch.attention_mask, batch.input_ids, batch.written)
    sides = [side[:, :width] for side in sides[:2]] + [side[:, width:] for side in sides[2:]]
    counted = torch.ones(len(texts), dtype=torch.bool, device=policy.device)
    return Rollout(*sides, counted.float(), counted, SamplerConfig(max_new_tokens=canvas))
