"""What GRPO and PPO share: whose turn it is, what is drawn and judged, and what is measured."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from mdmrl.config import InputError
from mdmrl.evaluation.accuracy import evaluate, numbers
from mdmrl.rewards import RewardLog, check_rewards, reward_values, total_reward
from mdmrl.rewards.protocol import Masking
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, SamplerOutput, generate
from mdmrl.sampling.output import checked
from mdmrl.training.data import checked_rows, rows_of_step
from mdmrl.training.loop import MAX_SKIPPED, Metrics, Optimizer, accelerator_for, open_run, train


class Rounds:
    """The rounds of a run on this process, each of one rollout and the updates made on it.

    The arguments are those of `train_grpo`, and of `collect` the two of `judging`.
    """

    def __init__(
        self, policy, rewards, rows, config, eval_rows, metric, probe, watch, draw=None, **judging
    ):
        self.policy, self.rewards, self.config, self.probe = policy, rewards, config, probe
        self.accelerator = accelerator_for(policy)
        self.share = self.accelerator.process_index, self.accelerator.num_processes
        length = config.max_completion_length
        self.rows, self.eval_rows = checked_rows(policy, rows, eval_rows, length)
        self.weights = judging.get("reward_weights")
        self.names = check_rewards(rewards, self.weights, self.rows)
        if config.failed_rewards == "mask":
            self.rewards = [Masking(reward) for reward in rewards]
        self.drawing = {"draw": draw or generate, "watch": watch}
        self.judging = judging
        named = dict(zip(self.names, rewards, strict=True))
        self.parts = {"rewards": named, "eval_rows": self.eval_rows, "metric": metric}
        self.parts |= {"probe": probe, "watch": watch} | ({"draw": draw} if draw else {})
        self.log, self.abstained = RewardLog(), 0  # of the last round; rounds in a row

    def micro_batches(
        self, rows: int, purpose: str, step: int, index: int = 0, size: int | None = None
    ) -> Iterator[tuple]:
        """The micro-batches of so many rows, and the random numbers of each for a round, or for its
        `index`-th update: those that it would have on a process of its own."""
        rank, processes = self.share
        parts = self.config.micro_batches(rows, size)
        first, each = index * processes + rank, len(parts)
        for i, part in enumerate(parts):
            numbers = self.config.seed, purpose, step, first * each + i
            yield part, generator_for(*numbers, self.policy.device)

    def draw_parts(self, step, policy, prompts, sampler, _, record) -> SamplerOutput:
        """Completions of a round's prompts, as many at once as `per_device_rollout_batch_size`
        says; a `draw` of one's own gets them all."""
        size, draw = self.config.rollout_batch, self.drawing["draw"]
        parts = [*self.micro_batches(len(prompts), "rollout", step, size=size)]
        if draw is not generate:
            parts = [(slice(None), parts[0][1])]
        drawn = []
        for part, random in parts:
            output = draw(policy, prompts[part], sampler, random, record)
            drawn.append(checked(output, len(prompts[part])))
        return SamplerOutput.joined(drawn, policy.pad_token_id)

    def collect(
        self, step: int, sampler: SamplerConfig, record: bool
    ) -> tuple[list[dict], Rollout, Metrics, dict]:
        """The rows of a round, and what `collect` makes of them.

        Raises:
            InputError: every reward abstained from every completion of several rounds.
        """
        config = self.config
        batch = rows_of_step(self.rows, config.prompts_per_process, step, *self.share, config.seed)
        asked = config.num_generations, sampler, None, record
        self.log = RewardLog(step, config.max_steps)
        ways = {"log": self.log, **self.drawing, **self.judging}
        ways["draw"] = partial(self.draw_parts, step)
        rollout, metrics, sample = collect(self.policy, batch, self.rewards, *asked, **ways)
        self._say_if_nothing_counts(rollout.counted, step)
        return batch, rollout, metrics, sample

    def judge(self, batch: Sequence[dict], output: SamplerOutput) -> Tensor:
        """The rewards of other completions of a round's prompts, (B,), nan where all abstain."""
        rows = [row for row in batch for _ in range(self.config.num_generations)]
        written = [row["prompt"] for row in rows], output.completions, output.token_lists()
        return total_reward(reward_values(self.rewards, *written, rows), self.weights)

    def _say_if_nothing_counts(self, counted: Tensor, step: int) -> None:
        """Warn of a round in which no sample got a reward, and refuse several in a row."""
        anywhere = any(gather_object([bool(counted.any())]))
        self.abstained = 0 if anywhere else self.abstained + 1
        if anywhere:
            return
        names = ", ".join(self.names)
        said = f"at step {step} every reward ({names}) returned None for every completion"
        if self.abstained >= MAX_SKIPPED:
            raise InputError(f"{said}, as in {self.abstained - 1} before: nothing is learnt")
        warnings.warn(f"{said}: nothing is learnt from it", stacklevel=4)

    def take_step(self, loss: float, step: int, batch: Sequence[dict]) -> Metrics:
        """The optimizer's step, on the gradient that the parameters hold."""
        asked = [row["prompt"] for row in batch]
        return self.optimizer.step(loss, f"step {step} on prompts {asked}")

    def held_out(self, step: int) -> Metrics:
        """Of greedy completions of the held-out prompts, and of the probe."""
        policy, metric = self.policy, self.parts["metric"]
        asked = self.eval_rows, self.config.sampler_for(policy, greedy=True), self.rewards, metric
        judging = {"reward_weights": self.weights, "log": RewardLog(step, self.config.max_steps)}
        judging["batch_size"] = self.config.per_device_eval_batch_size
        found = evaluate(policy, *asked, "eval/", **judging, **self.drawing)
        measured = numbers(self.probe, policy) if self.probe else {}
        return found | {f"eval/{name}": value for name, value in measured.items()}

    def train(
        self,
        algorithm: str,
        groups: Sequence[dict],
        update: Callable[[int], tuple[Metrics, dict]],
        values: torch.nn.Module | None = None,
    ) -> Path:
        """Make the rounds that are left, each by `update(step)`; returns the run's folder.

        Args:
            algorithm: its name and version; groups: of parameters, see `Optimizer`.
        """
        policy, config = self.policy, self.config

        def updated(step: int) -> tuple[Metrics, dict]:
            found, sample = update(step)
            if config.needs_reference and (step + 1) % config.ref_model_sync_steps == 0:
                policy.sync_reference()
            return self.log.beside(found, "step", "step_time"), sample

        self.optimizer = Optimizer(policy, groups, self.accelerator, config.max_grad_norm)
        with open_run(policy, self.rows, config, algorithm, self.accelerator, **self.parts) as run:
            if config.needs_reference and not policy.uses_lora:
                policy.sync_reference()
            held_out = self.held_out if self.eval_rows else None
            train(policy, run, config, self.optimizer, updated, held_out, values)
            return run.folder
