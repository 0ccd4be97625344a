"""Rejection-sampling fine-tuning (Yuan et al. 2023, RFT): learning from right answers of one's own.

Completions are drawn, those whose reward reaches a threshold are kept, and the family's loss of
`mdmrl.training.supervised` is minimised on them, as supervised fine-tuning does:

    offline   all are drawn from the starting policy, each different one kept once
    online    those of an update are drawn from the policy as it is; wrong ones count as 0, so that
              the mean over right ones is multiplied by their share (Shao et al. 2024)

Right completions beside wrong ones are pairs for `mdmrl.rl.preference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object

from mdmrl.config import InputError, require
from mdmrl.policies import Policy
from mdmrl.rl.config import RLConfig
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.rl.rounds import Rounds
from mdmrl.rl.values import prompts_of
from mdmrl.runs import generator_for
from mdmrl.training.config import SFTConfig
from mdmrl.training.data import rows_of_step
from mdmrl.training.loop import MAX_SKIPPED, Metrics, require_kinds
from mdmrl.training.sft import learn

ALGORITHM = "rft-1"  # part of a run's identity: raise it when results change
DRAWN_TOGETHER = 64  # completions, before offline RFT and for pairs


@dataclass
class RFTConfig(SFTConfig):
    """Settings of `train_rft`; `SFTConfig` and `TrainingConfig` have those that are not listed.

    Attributes:
        num_generations: completions drawn for each prompt.
        temperature: at which they are drawn.
        reward_threshold: completions of this reward or more are right.
        online: draw those of each update from the policy as it is.
    """

    output_dir: str = "runs/rft"
    num_generations: int = 8
    temperature: float = 1.0
    reward_threshold: float = 1.0
    online: bool = False

    COUNTS: ClassVar = (*SFTConfig.COUNTS, "num_generations")
    POSITIVE: ClassVar = (*SFTConfig.POSITIVE, "temperature")
    OWN_SAMPLER: ClassVar = RLConfig.OWN_SAMPLER
    needs_reference: ClassVar = False
    failed_rewards: ClassVar = "stop"

    def validate(self) -> None:
        super().validate()
        threshold = self.reward_threshold
        require(threshold == threshold, f"reward_threshold={threshold}: expected a number")
        require(
            not self.online or self.batch % self.num_generations == 0,
            f"num_generations={self.num_generations}, per_device_train_batch_size x "
            f"gradient_accumulation_steps = {self.batch}: expected a multiple of the first",
        )

    @property
    def drawn_at(self) -> float:
        return self.temperature

    @property
    def prompts_per_process(self) -> int:
        return self.batch // self.num_generations


def train_rft(
    policy: Policy,
    rewards: Sequence[Callable],
    rows: Sequence[dict],
    config: RFTConfig,
    eval_rows: Sequence[dict] = (),
    metric: Callable[[str, dict], bool] | None = None,
    watch: Callable | None = None,
) -> Path:
    """Fine-tune `policy` in place on right completions of its own; returns the run's folder.

    Takes, resumes, logs and shares the work as `train_grpo`, and learns as `train_sft`, but that
    LoRA is not merged. A run that is resumed draws the same completions again, so the policy must
    be the starting one. `num_tokens` are of completions learnt; the first row's `token_forwards`
    are those of all that was drawn, online each row's. `right` is the share that was.

    Raises:
        InputError: bad rewards or rows; nothing right among all completions that were drawn, or
            online in several updates in a row.
        FloatingPointError: several updates in a row that are not finite.
    """
    require_kinds(policy, config, RFTConfig)
    rounds = Rounds(policy, rewards, rows, config, eval_rows, metric, None, watch)
    none_right, pool, at_first = 0, [], {}
    if not config.online:
        before = policy.positions_computed
        rank, processes = rounds.share
        mine = draw_graded(policy, rewards, rounds.rows[rank::processes], config, rank)
        graded = gather_object([*chain(*mine)])
        right = [one.ids for one in graded if one.reward >= config.reward_threshold]
        if not right:
            raise nothing_right([one.reward for one in graded], config)
        pool = list(dict.fromkeys(right))
        drawn = policy.positions_computed - before
        at_first = {"right": len(right) / len(graded), "kept": len(pool), "token_forwards": drawn}

    def make_update(step: int) -> tuple[Metrics, dict | None]:
        nonlocal none_right
        share, sample = 1.0, None
        if config.online:
            asked = step, config.sampler_for(policy), False
            _, rollout, metrics, sample = rounds.collect(*asked)
            texts = ids_of(rollout.select(rollout.rewards >= config.reward_threshold))
            share = sum(gather_object([len(texts)])) / (config.batch * rounds.share[1])
            none_right = 0 if share else none_right + 1
            if none_right == MAX_SKIPPED:
                raise nothing_right(rollout.rewards.nan_to_num(-torch.inf).tolist(), config)
            metrics["right"] = share
        else:
            metrics = dict(at_first) if step == 0 else {}
            texts = rows_of_step(pool, config.batch, step, *rounds.share, config.seed)
        learnt = learn(policy, texts, config, step, rounds.optimizer, f"step {step}", share)
        return metrics | learnt, sample

    parameters = [*policy.trainable_parameters().values()]
    groups = [{"params": parameters, "weight_decay": config.weight_decay}]
    return rounds.train(ALGORITHM, groups, make_update)


def nothing_right(rewards: Sequence[float], config: RFTConfig) -> InputError:
    """What to say of completions that have these rewards."""
    wanted = f"reward_threshold={config.reward_threshold}"
    return InputError(
        f"none of {len(rewards)} completions has a reward of {wanted} or more, the best "
        f"{max(rewards):.3g}: there is nothing to learn from; lower it, raise num_generations, or "
        "begin with a policy that is sometimes right"
    )


class Graded(NamedTuple):
    """A completion that was drawn: token ids of its prompt and of itself, its text, whether it
    ends, and its reward (-inf where all rewards abstained)."""

    ids: tuple[tuple[int, ...], tuple[int, ...]]
    text: str
    ended: bool
    reward: float


def draw_graded(
    policy: Policy, rewards: Sequence[Callable], rows: Sequence[dict], config: RFTConfig, rank=0
) -> list[list[Graded]]:
    """`num_generations` completions of each row's prompt, drawn from the policy as it is."""
    count, sampler, found = config.num_generations, config.sampler_for(policy), []
    size = max(1, DRAWN_TOGETHER // count)
    for start in range(0, len(rows), size):
        generator = generator_for(config.seed, "rft", start, rank, policy.device)
        batch = rows[start : start + size]
        rollout, *_ = collect(policy, batch, rewards, count, sampler, generator)
        texts = policy.decode(rollout.completion_ids, rollout.completion_mask)
        ended = policy.is_end(rollout.completion_ids).any(1).tolist()
        values = rollout.rewards.nan_to_num(-torch.inf).tolist()
        graded = [*map(Graded, ids_of(rollout), texts, ended, values)]
        found += [graded[i : i + count] for i in range(0, len(graded), count)]
    return found


def ids_of(rollout: Rollout) -> list[tuple]:
    """Token ids of each prompt and of its completion up to its end."""
    both = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    completions = [tuple(ids[mask].tolist()) for ids, mask in both]
    return list(zip(prompts_of(rollout), completions, strict=True))


def sampled_pairs(
    policy: Policy, rewards: Sequence[Callable], rows: Sequence[dict], config: RFTConfig
) -> list[dict]:
    """Rows for `train_dpo` from completions that are drawn as RFT draws them: of each prompt the
    different right texts, each beside a wrong one, as many as there are of both. Texts that were
    cut off have no place in them.

    Raises:
        InputError: no prompt has a right completion and a wrong one.
    """
    least, pairs = config.reward_threshold, []
    for row, group in zip(rows, draw_graded(policy, rewards, rows, config), strict=True):
        right, wrong = (
            dict.fromkeys(x.text for x in group if x.ended and (x.reward >= least) == side)
            for side in (True, False)
        )
        for chosen, rejected in zip(right, wrong, strict=False):
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    require(
        len(pairs) > 0,
        f"no prompt of {len(rows)} has completions on both sides of reward_threshold={least}: "
        "raise num_generations, or give more prompts",
    )
    return pairs
