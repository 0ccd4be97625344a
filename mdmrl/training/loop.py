"""The loop that GRPO, PPO and supervised fine-tuning share: open, resume, look, update, log, save.

An update is a function of its number: which rows it takes and what it draws derive from (seed,
purpose, step, process), so that a run that was cut off goes on with the same bits. So do the global
random numbers, which are put back after it.
"""

from __future__ import annotations

import atexit
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from mdmrl.config import require, require_function
from mdmrl.evaluation.accuracy import ARGUMENTS
from mdmrl.identity import known, named
from mdmrl.policies import Policy
from mdmrl.policies.sharding import ShardedAdamW
from mdmrl.progress import Progress
from mdmrl.runs import NotWritten, Run, Stopped, flushed_denormals
from mdmrl.training.checkpoints import restore, save
from mdmrl.training.config import TrainingConfig
from mdmrl.training.seeding import seeded
from mdmrl.training.tracking import reporting

MAX_SKIPPED = 5
OTHERS = ("DEEPSPEED", "MEGATRON_LM")
CALLED = ARGUMENTS | {"draw": (*ARGUMENTS["draw"], "record")}
TURN = 1e-3  # seconds between updates, in which a thread that waits for the policy gets it
Metrics = dict[str, float | None]


def accelerator_for(policy: Policy) -> Accelerator:
    """Accelerate's view of the processes that train, each `policy` being on its own device, which
    it can be told once in a process. Where it is to use FSDP, they share out the policy's weights.

    Raises:
        InputError: another way to share them out, or FSDP of an adapter or of version 1.
    """
    for way in OTHERS:
        require(
            not asked(way),
            f"accelerate is to use {way}: each process holds all weights here, or its shards of "
            "them (--use_fsdp --fsdp_version 2); launch without it",
        )
    version = os.environ.get("FSDP_VERSION", "1")
    require(
        not asked("FSDP") or version == "2",
        f"FSDP_VERSION={version}: expected 2 (--fsdp_version 2), whose `fully_shard` is used",
    )
    require(
        not (asked("FSDP") and policy.uses_lora),
        "accelerate is to use FSDP with an adapter, whose gradients and moments are small: launch "
        "without it, and load_policy(..., dtype='bfloat16') where a card cannot hold the weights",
    )
    accelerator = Accelerator(cpu=policy.device.type == "cpu" and not is_initialized())
    if asked("FSDP") and accelerator.num_processes > 1:
        policy.share_out()
    return accelerator


def asked(way: str) -> bool:
    """Whether accelerate is to share out weights that way."""
    return os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true"


@atexit.register
def leave_group() -> None:
    """End this process's part in the group of those that train, if there is one: a group that
    outlives the interpreter aborts, now and then, a process whose work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def open_run(
    policy: Policy,
    rows: Sequence[dict],
    config: TrainingConfig,
    algorithm: str,
    accelerator: Accelerator,
    **parts,
) -> Run:
    """The run's folder, known by all that decides its results: `algorithm`, its name and version,
    and `parts`, what else was brought along, functions and rows that are not trained on."""
    require_full_precision(policy)
    if config.bf16 and policy.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        require(native, "bf16=True, but this card has no bfloat16: leave it out")
    for name in CALLED.keys() & parts.keys():
        if parts[name] is not None:
            require_function(parts[name], name, CALLED[name])
    settings = config.settings_for(policy)
    identity = known(settings | parts) | {
        "algorithm": algorithm,
        "policy": policy.fingerprint() | {"family": named(type(policy))},
        "rows": known(rows),
        "processes": accelerator.num_processes,
    }
    since = known(type(config)().settings_for(policy))
    with accelerator.main_process_first():
        return Run(config.output_dir, identity, since, accelerator.is_main_process, policy.device)


def require_kinds(policy: Policy, config: TrainingConfig, wanted: type[TrainingConfig]) -> None:
    """Refuse what is no policy, and no config of the algorithm that is `wanted`."""
    fits = {"policy": isinstance(policy, Policy), "config": isinstance(config, wanted)}
    expected = {"policy": "a policy, of load_policy", "config": f"a {wanted.__name__}(...)"}
    for name, given in {"policy": policy, "config": config}.items():
        said = repr(given).partition("\n")[0]
        require(fits[name], f"{name}={said:.80}: expected {expected[name]}")


def require_full_precision(policy: Policy) -> None:
    """Refuse to train weights in which an update is lost: one of bfloat16 that is 1 does not move
    by less than 0.002, and AdamW moves it by its learning rate."""
    for name, weight in policy.trainable_parameters().items():
        require(
            weight.dtype.itemsize >= 4,
            f"{name} is {weight.dtype}, in which updates of AdamW are lost: load the policy with "
            "dtype='float32' and set bf16=True, which computes in bfloat16, or train an adapter "
            "(add_lora)",
        )


class Optimizer:
    """AdamW that takes no step where a gradient is not finite, and gives up after `most_skipped`
    such updates in a row. Each of the `groups`, which are torch's, is clipped by itself. Several
    processes share its state out: each steps its part of the weights and sends them to the others
    (ZeRO's first stage, Rajbhandari et al. 2020), or has only shards of them (FSDP)."""

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[dict],
        accelerator: Accelerator,
        max_grad_norm: float,
        most_skipped: int = MAX_SKIPPED,
    ):
        self.shared = accelerator.num_processes > 1
        if policy.sharding is not None:
            self.adamw = ShardedAdamW(groups, policy.sharding, weight_decay=0.0)
        elif self.shared:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second, and warns

            self.adamw = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, weight_decay=0.0)
        else:
            self.adamw = torch.optim.AdamW(groups, weight_decay=0.0)
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.most_skipped, self.skipped = most_skipped, 0

    def step(self, loss: float, batch: str) -> Metrics:
        """Average the gradient of `batch` over processes, clip it, and take a step.

        Returns `grad_norm` of the first group before clipping, and `skipped_updates` in a row.

        Raises:
            FloatingPointError: `most_skipped` updates in a row that are not finite.
        """
        norms = [self._finished(group["params"]) for group in self.adamw.param_groups]
        finite = all(map(math.isfinite, gather_object([loss, *norms])))
        if finite:
            self.adamw.step()
        self.adamw.zero_grad()
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= self.most_skipped:
            raise FloatingPointError(
                f"{self.skipped} updates in a row had a loss or gradient that is not finite, the "
                f"last at {batch}: lower learning_rate (or beta)"
            )
        return {"grad_norm": norms[0], "skipped_updates": self.skipped}

    def gather(self) -> None:
        """Bring the parts of the state together on the main process, for a checkpoint."""
        if self.shared:
            self.adamw.consolidate_state_dict(to=0)

    def _finished(self, parameters: Sequence[Tensor]) -> float:
        for parameter in parameters:
            if not isinstance(parameter, DTensor):  # of shards they are summed as they come
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@flushed_denormals()
def train(
    policy: Policy,
    run: Run,
    config: TrainingConfig,
    optimizer: Optimizer,
    update: Callable[[int], tuple[Metrics, dict | None]],
    held_out: Callable[[int], Metrics] | None = None,
    values: torch.nn.Module | None = None,
) -> None:
    """Make the updates of a run that are left, from its newest whole checkpoint on.

    Args:
        update: makes the update of that number; returns its metrics, and what to look at of it.
        held_out: measures the policy before every `eval_steps`-th update, and at the end; takes the
            number of updates made.
        values: a value head that is trained and kept beside the policy.

    A checkpoint that the disk does not take is warned of, and the one before stays, but at the end.

    Raises:
        Stopped: `mdmrl.runs.request_stop` asked for it; the last finished update is kept.
        NotWritten: the disk takes no row of the log, or not the last checkpoint.
        RunFolderError: checkpoints of which none is whole.
    """
    accelerator, last = optimizer.accelerator, config.max_steps
    kept = run, policy, optimizer.adamw, values
    with policy.lock:
        first = saved = restore(*kept, last)
    if first == last and run.complete(last):
        return
    accelerator.wait_for_everyone()  # before the log that `complete` reads is cut
    writes = accelerator.is_main_process
    if writes:
        run.rewind(first)
        if lost := first - len(run.logged()):
            said = f"{run.folder}/metrics.jsonl lacks {lost} of the rows of its {first} updates"
            warnings.warn(f"{said}, which were logged and are lost; the run goes on", stacklevel=2)

    gathered = first

    def keep(step: int) -> None:
        nonlocal saved, gathered
        if step != gathered:
            optimizer.gather()
            gathered = step
        reference = policy.reference_state()
        if not writes or step == saved:
            return
        try:
            save(*kept, reference, step)
            saved = step
        except NotWritten as error:
            if step == last or run.stop_requested():
                raise
            warnings.warn(f"{error}; until then step {saved} is the last kept", stacklevel=2)

    def stop_if_asked(step: int) -> None:
        if any(gather_object([run.stop_requested()])):
            keep(step)
            said = f"{run.folder}: stopped as asked after {step} of {last} updates"
            raise Stopped(f"{said}; the same call goes on from there")

    def random_at(step: int):
        return seeded(config.seed, step, accelerator.process_index, policy.device)

    shown = Progress(run.folder.name, first, last, shown=writes)
    told = reporting(run, config.report_to if writes else "none")
    computing = policy.computing(config.bf16, config.gradient_checkpointing)
    with shown as progress, told as report, computing:
        for step in range(first, last):
            stop_if_asked(step)
            looked = {}
            if held_out and step % config.eval_steps == 0:
                with random_at(step):
                    looked = held_out(step)
                stop_if_asked(step)
            start = time.perf_counter()
            with policy.lock, random_at(step):
                found, sample = update(step)
            metrics = averaged(looked | found | {"step_time": time.perf_counter() - start})
            if writes:
                run.log({"step": step, **metrics})
                report({"step": step, **metrics})
                if sample:
                    run.log({"step": step, **sample}, "samples")
            if (step + 1) % config.save_steps == 0 or step + 1 == last:
                keep(step + 1)
            progress.update(step + 1, metrics)
            time.sleep(TURN)
        stop_if_asked(last)
        with random_at(last):
            looked = held_out(last) if held_out else {}
        if writes:
            run.log({"step": last, **looked})
            report({"step": last, **looked})


def mean_count(count: int) -> float:
    """The mean over processes of a count, at least one of all: what sums are divided by whose
    gradients are averaged over processes."""
    everywhere = gather_object([count])
    return max(1, sum(everywhere)) / len(everywhere)


def averaged(metrics: Metrics) -> Metrics:
    """Metrics averaged over the processes that have them."""
    everywhere = gather_object([metrics])
    if len(everywhere) == 1:
        return metrics
    counted = {name: [] for found in everywhere for name in found}
    for found in everywhere:
        for name, value in found.items():
            counted[name] += [] if value is None else [value]
    return {name: sum(x) / len(x) if x else None for name, x in counted.items()}
