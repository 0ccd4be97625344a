"""Supervised fine-tuning: the cold start before RL.

A policy of any family minimises its loss of `mdmrl.training.supervised` over completions alone:
prompt tokens are neither predicted nor masked. The loss is a mean over the positions that are
learnt, whatever micro-batch or process they fall into: the tokens of a completion and its end
(autoregressive), or the whole canvas. The optimizer is AdamW. Dropout, where the policy has any, is
on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from mdmrl.config import resolve
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies import Policy, merge_lora
from mdmrl.runs import derived_seed, generator_for, kept_random_state, written_aside
from mdmrl.training.config import SFTConfig
from mdmrl.training.data import listed, refuse_learnt, rows_of_step
from mdmrl.training.loop import (
    Metrics,
    Optimizer,
    accelerator_for,
    open_run,
    require_kinds,
    train,
)
from mdmrl.training.supervised import Pair, collate, encode_pairs

ALGORITHM = "sft-1"  # part of a run's identity: raise it when results change


def train_sft(
    policy: Policy,
    rows: Sequence[dict],
    config: SFTConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
    watch: Callable | None = None,
) -> Path:
    """Fine-tune `policy` in place; returns the run's folder, with `model/` for `load_policy`.

    Takes, resumes and shares the work as `train_grpo`, with `prompt` and `completion` in all rows,
    strings or message lists; a run that is extended goes on with the learning rates of its new
    length. With LoRA the adapter is merged into the weights at the end, so that the reference of RL
    is the fine-tuned policy; merged into bfloat16 weights it is rounded to them. The last
    checkpoint keeps it apart.

    Each row of `metrics.jsonl` holds `loss` in nats a position, `grad_norm` before clipping,
    `learning_rate`, `epoch`, `num_tokens` (of completions, filling not counted), `step_time` in
    seconds and `token_forwards/scoring`, positions computed. `eval/loss` is the loss of
    `eval_rows`, under the same noise every time; with a `metric`, `eval/accuracy` and what
    `evaluate` says of greedy completions; all before the update of that step; the last row has
    nothing else.

    Raises:
        InputError: no rows, one that does not fit (see `encode_pairs`), or a held-out prompt
            among the training rows.
        FloatingPointError: a loss or gradient that is not finite.
    """
    require_kinds(policy, config, SFTConfig)
    accelerator = accelerator_for(policy)
    rank, processes = accelerator.process_index, accelerator.num_processes
    rows, eval_rows = listed(rows), listed(eval_rows, "eval_rows")
    pairs, held_out_pairs = (
        encode_pairs(policy, part, config.max_completion_length) for part in (rows, eval_rows)
    )
    refuse_learnt(rows, eval_rows)
    parameters = [*policy.trainable_parameters().values()]
    groups = [{"params": parameters, "weight_decay": config.weight_decay}]

    def held_out(step: int) -> Metrics:
        found = {"eval/loss": held_out_loss(policy, held_out_pairs, config)}
        if metric is not None:
            sampler = config.sampler_for(policy)
            how = {"batch_size": config.per_device_eval_batch_size, "watch": watch}
            found |= evaluate(policy, eval_rows, sampler, (), metric, "eval/", **how)
        return found

    def make_update(step: int) -> tuple[Metrics, None]:
        drawn = rows_of_step(pairs, config.batch, step, rank, processes, config.seed)
        metrics = learn(policy, drawn, config, step, optimizer, f"step {step}")
        return metrics | {"epoch": (step + 1) * config.batch * processes / len(pairs)}, None

    parts = {"eval_rows": eval_rows, "metric": metric, "watch": watch}
    with open_run(policy, rows, config, ALGORITHM, accelerator, **parts) as run:
        optimizer = Optimizer(policy, groups, accelerator, config.max_grad_norm, most_skipped=1)
        train(policy, run, config, optimizer, make_update, held_out if eval_rows else None)
        if policy.uses_lora:
            merge_lora(policy)
        if accelerator.is_main_process:
            with written_aside(run.folder / "model") as aside:
                policy.save_pretrained(aside)
        return run.folder


def learn(
    policy: Policy,
    drawn: Sequence[Pair],
    config: SFTConfig,
    step: int,
    optimizer: Optimizer,
    batch: str,
    share: float = 1.0,
) -> Metrics:
    """Make the update of that number, on the mean loss over what all processes have `drawn`, times
    `share`; returns its metrics. `batch` is what an error calls it."""
    accelerator, before = optimizer.accelerator, policy.positions_computed
    policy.progress = step / config.max_steps
    rank, processes = accelerator.process_index, accelerator.num_processes
    loss, count = backward(policy, drawn, config, step, rank)
    counts = sum(gather_object([count])) or 1  # of nothing the gradient is 0
    mean = counts / processes / (share or 1.0)  # the gradient is averaged over processes
    for parameter in policy.trainable_parameters().values():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = slope.div_(mean)
    rate = config.learning_rate_at(step)
    batch += f" on prompts {policy.tokenizer.batch_decode([prompt for prompt, _ in drawn])}"
    optimizer.adamw.param_groups[0]["lr"] = rate
    return {
        "loss": loss / mean,
        **optimizer.step(loss / mean, batch),
        "learning_rate": rate,
        "num_tokens": sum(len(completion) for _, completion in drawn),
        "token_forwards/scoring": policy.positions_computed - before,
    }


def backward(
    policy: Policy, drawn: Sequence[Pair], config: SFTConfig, step: int, rank: int
) -> tuple[float, int]:
    """Add up the gradient of the summed loss by micro-batches; returns it and how many positions it
    is a sum over."""
    total, count = 0.0, 0
    with policy.together():
        policy.model.train()
        for i, pairs in enumerate(parts_of(drawn, config)):
            index = rank * config.gradient_accumulation_steps + i
            noise = generator_for(config.seed, "noise", step, index, policy.device)
            with kept_random_state(policy.device):
                torch.manual_seed(derived_seed(config.seed, "dropout", step, index))
                loss, positions = summed_loss(policy, pairs, config, noise)
            policy.backward(loss)
            total, count = total + loss.item(), count + positions
        policy.model.eval()
    return total, count


@torch.no_grad()
def held_out_loss(policy: Policy, pairs: Sequence[Pair], config: SFTConfig) -> float:
    """The mean loss of all `pairs`, in nats a position."""
    total, count = 0.0, 0
    for i, part in enumerate(parts_of(pairs, config)):
        noise = generator_for(config.seed, "held-out", index=i, device=policy.device)
        loss, positions = summed_loss(policy, part, config, noise)
        total, count = total + loss.item(), count + positions
    return total / count


def summed_loss(
    policy: Policy, pairs: Sequence[Pair], config: SFTConfig, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The loss of one batch summed over the positions that are learnt, and their number."""
    end = policy.tokenizer.eos_token_id
    batch = collate(pairs, config.max_completion_length, end).to(policy.device)
    return resolve(policy.loss)(policy, batch, False, generator)


def parts_of(pairs: Sequence[Pair], config: SFTConfig) -> list[Sequence[Pair]]:
    return [pairs[part] for part in config.micro_batches(len(pairs))]
