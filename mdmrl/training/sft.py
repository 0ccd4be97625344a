"""Supervised fine-tuning: the cold start before RL.

A policy of any family minimises its loss of `mdmrl.training.supervised` over completions alone:
prompt tokens are neither predicted nor masked. The loss is a mean over the positions that are
learnt, whatever micro-batch or process they fall into: the tokens of a completion and its end (ar), or the
whole canvas (mdm, bd). The optimizer is AdamW. Dropout, where the policy has any, is on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.policies.base import Policy
from mdmrl.policies.lora import merge_lora
from mdmrl.rl.grpo import averaged, finish_gradient
from mdmrl.runs import derived_seed, generator_for, kept_random_state
from mdmrl.training.checkpoints import open_run, restore, save
from mdmrl.training.config import SFTConfig
from mdmrl.training.data import draw_rows
from mdmrl.training.supervised import Pair, collate, encode_pairs, loss_of

ALGORITHM = "sft-1"  # part of a run's hash: raise it when results change


def train_sft(
    policy: Policy,
    rows: Sequence[dict],
    config: SFTConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
) -> Path:
    """Fine-tune `policy` in place; returns the run's folder, with `model/` for `load_policy`.

    Takes, resumes and shares the work as `train_grpo`. With LoRA the adapter is merged into the
    weights at the end, so that the reference of RL is the fine-tuned policy; merged into bfloat16
    weights it is rounded to them. The last checkpoint keeps it apart.

    Args:
        rows: `prompt` and `completion`, strings or message lists.
        eval_rows, metric: held-out rows of the same kind, and the true metric,
            `metric(completion, row) -> bool`.

    Each row of `metrics.jsonl` holds `loss` in nats a position, `grad_norm` before clipping,
    `learning_rate`, `epoch`, `num_tokens` (of completions, filling not counted) and `step_time` in
    seconds. `eval/loss` is the loss of `eval_rows`, under the same noise every time; with a
    `metric`, `eval/accuracy` and what `evaluate` says of greedy completions; all before the update
    of that step; the last row has nothing else.

    Raises:
        ValueError: no rows, one that does not fit (see `encode_pairs`), or a held-out prompt
            among the training rows.
        FloatingPointError: a gradient that is not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=policy.device.type == "cpu")
    rank, processes = accelerator.process_index, accelerator.num_processes
    require(len(rows) > 0, "no training rows given")
    own, length = policy.block_length, config.max_completion_length
    require(
        own is None or length % own == 0,
        f"max_completion_length={length}: expected a multiple of the policy's blocks of {own}",
    )
    pairs = encode_pairs(policy, rows, length)
    held_out_pairs = encode_pairs(policy, eval_rows, length)
    learnt = {repr(row["prompt"]) for row in rows}
    for row in eval_rows:
        require(
            repr(row["prompt"]) not in learnt,
            f"the held-out prompt {row['prompt']!r:.80} is among the training rows: take it out",
        )
    run = open_run(policy, [*rows, *eval_rows], config, ALGORITHM, accelerator)
    parameters = policy.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=config.weight_decay)
    first = restore(run, policy, optimizer)
    complete = run.complete(config.max_steps) and first == config.max_steps
    accelerator.wait_for_everyone()  # before the log that `complete` reads is cut
    if accelerator.is_main_process and not complete:
        run.rewind(first)

    def held_out() -> dict[str, float]:
        found = {"eval/loss": held_out_loss(policy, held_out_pairs, config)}
        if metric is not None:
            found |= evaluate(policy, eval_rows, config.sampler(), (), metric, "eval/")
        return found

    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    for step in range(first, config.max_steps):
        metrics: dict[str, float] = {}
        if eval_rows and step % config.eval_steps == 0:
            metrics |= held_out()
        start = time.perf_counter()
        drawn = draw_rows(pairs, batch, step, rank, processes, config.seed)
        loss, count = backward(policy, drawn, config, step, rank, processes)
        mean = accelerator.reduce(torch.tensor(count, device=policy.device), "mean").item()
        for parameter in parameters.values():
            parameter.grad /= mean
        norm = finish_gradient(parameters, accelerator, config.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"grad_norm={norm}, loss={loss / mean} at step {step}: lower learning_rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {
            "loss": loss / mean,
            "grad_norm": norm,
            "learning_rate": config.learning_rate_at(step),
            "epoch": (step + 1) * batch * processes / len(pairs),
            "num_tokens": sum(len(completion) for _, completion in drawn),
            "step_time": time.perf_counter() - start,
        }
        metrics = averaged(metrics, accelerator)
        if accelerator.is_main_process:
            run.log({"step": step, **metrics})
            if (step + 1) % config.save_steps == 0 or step + 1 == config.max_steps:
                save(run, policy, optimizer, step + 1)
    if policy.uses_lora:
        merge_lora(policy)
    if accelerator.is_main_process:
        policy.save_pretrained(run.folder / "model")
        if not complete:
            run.log({"step": config.max_steps, **(held_out() if eval_rows else {})})
    return run.folder


def backward(
    policy: Policy,
    drawn: Sequence[Pair],
    config: SFTConfig,
    step: int,
    rank: int,
    processes: int,
) -> tuple[float, float]:
    """Add up the gradient of the summed loss, micro-batch by micro-batch; returns that loss and the
    number of positions it is a sum over."""
    total, count = 0.0, 0.0
    policy.model.train()
    for i, pairs in enumerate(micro_batches(drawn, config)):
        index = i * processes + rank
        noise = generator_for(config.seed, "noise", step, index, policy.device)
        with kept_random_state(policy.device):
            torch.manual_seed(derived_seed(config.seed, "dropout", step, index))
            loss, positions = summed_loss(policy, pairs, config, noise)
        loss.backward()
        total, count = total + loss.item(), count + positions
    policy.model.eval()
    return total, count


@torch.no_grad()
def held_out_loss(policy: Policy, pairs: Sequence[Pair], config: SFTConfig) -> float:
    """The mean loss of all `pairs`, in nats a position."""
    total, count = 0.0, 0.0
    for i, part in enumerate(micro_batches(pairs, config)):
        noise = generator_for(config.seed, "held-out", index=i, device=policy.device)
        loss, positions = summed_loss(policy, part, config, noise)
        total, count = total + loss.item(), count + positions
    return total / count


def summed_loss(
    policy: Policy, pairs: Sequence[Pair], config: SFTConfig, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The loss of one batch summed over the positions that are learnt, and their number."""
    end = policy.tokenizer.eos_token_id
    batch = collate(pairs, config.max_completion_length, end).to(policy.device)
    positions = (batch.written if policy.kind == "ar" else batch.completion).sum().item()
    return loss_of(policy, batch, False, generator) * positions, float(positions)


def micro_batches(pairs: Sequence[Pair], config: SFTConfig) -> list[Sequence[Pair]]:
    size = config.per_device_train_batch_size
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
