"""Value-guided denoising: text that a value function judges poor is drawn again before it is done.

A completion is revealed block by block as in `mdmrl.sampling.denoise`. Before a block's first step,
after S/4 and S/2 of its S steps and before its last step, V looks at the state; with thresholds
low <= high of that block and that point,

    V >= high           go on
    low <= V < high     the block again, from [MASK]
    V < low             back: the description again, or the block before where there is none

A description is what the first `description_length` positions hold: text on which all that follows
is conditioned (phase 1 of the hierarchy, in one canvas with phase 2). Two ways to set thresholds:

    "faithful"    the thesis's three bands (3.3.3) on one V, at S/4 and S/2 of every block
    "two_gates"   before any denoising behind the description: V < tau_y goes back; at S/4 and S/2
                  of every block behind it: V < tau_x is the block again, and the `patience`-th
                  failure of a block goes back

Every forward pass makes one step for every row, each at its own block and step: a row that is sent
back starts over while the others go on, and no pass has an idle row. V sees the state in the pass
that makes the step, so judging is free; a state that fails has cost its step, which is made all the
same and kept with it.

What is rejected counts. A row may be sent back only if the rest of the text, from there on, still
fits its `budget`, so that no completion costs more. Where it does not fit, the row takes up the
attempt with the highest V at this very point, and goes on.

What the thesis leaves open or says otherwise:
 * It accepts above the threshold in one place and below it in another; high V is good.
 * Thresholds are quantiles of V over base rollouts (`calibrate`) of prompts that are not judged.
 * "Back" without a description, and without a block before, is the block again.
 * No caches, no guidance, no revision, one quota a step: rows at different blocks share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.policies import MaskedDiffusionPolicy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling.attempts import Attempts, Judgement, Value
from mdmrl.sampling.choose import choose, commit_score, draw, likeliest
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.guide import GuideConfig, Thresholds, checked
from mdmrl.sampling.output import APPROXIMATE, SamplerOutput
from mdmrl.sampling.states import look_at


@dataclass(kw_only=True)
class GuidedOutput(SamplerOutput):
    """Completions, and how they came about.

    Attributes:
        values: V along the path that was kept, (B, blocks, 2 + checks): before the first step of a
            block, at the checks, and before its last step; nan behind the end of a text.
        judgements: every look that V took at a row, in order.
        spent: positions that each completion pushed through the network, its own ones without
            padding, (B,); `token_forwards` counts the padding of the batch too.
    """

    values: Tensor
    judgements: list[list[Judgement]]
    spent: Tensor

    @property
    def final_values(self) -> Tensor:
        """V before the last step of each text, (B,): behind it V is 0 by definition."""
        last = (~self.values[:, :, -1].isnan()).sum(1) - 1
        return self.values[torch.arange(len(last)), last, -1]


def calibrate(
    policy: MaskedDiffusionPolicy,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    guide: GuideConfig,
    value: Value,
    generator: torch.Generator | None = None,
) -> Thresholds:
    """Thresholds from one base rollout of each of `prompts`, which are then not to be judged."""
    found = generate_guided(policy, prompts, config, guide, value, generator=generator)
    length = config.max_new_tokens // found.values.shape[1]
    return Thresholds.of(found.values, guide, length, prompts)


@torch.no_grad()
def generate_guided(
    policy: MaskedDiffusionPolicy,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    guide: GuideConfig,
    value: Value,
    thresholds: Thresholds | None = None,
    generator: torch.Generator | None = None,
) -> GuidedOutput:
    """Complete `prompts`, guided by `value`; without `thresholds` a base rollout, with V looked at.

    Raises:
        ValueError: a sampler whose rows cannot be at different blocks, thresholds of another shape
            or calibrated on one of `prompts`, or a V of another shape or that is no number.

    >>> V = ValueHead.from_pretrained("runs/ppo/checkpoints/step-000060/values")
    >>> value, sampler = lambda states: V(states.features), SamplerConfig(temperature=1, ...)
    >>> guide = GuideConfig(budget=3)
    >>> thresholds = calibrate(policy, calibration_prompts, sampler, guide, value)
    >>> generate_guided(policy, prompts, sampler, guide, value, thresholds).completions
    """
    config = checked(policy, prompts, config, guide, thresholds)
    generator = generator or generator_for(0, "guided", device=policy.device)
    batch = Attempts(policy, prompts, config, guide, thresholds)
    ends = torch.tensor(policy.end_token_ids, device=policy.device)
    nfe = token_forwards = 0

    while len(rows := (batch.block < batch.blocks).nonzero()[:, 0]):
        block, step = batch.block[rows], batch.step[rows]
        columns = batch.columns(block)  # (R, K)
        todo = batch.open_[rows[:, None], columns]  # (R, K), N of them True
        hidden, context, cost = look_at(
            policy, batch.canvas[rows], batch.attention[rows], batch.width, columns
        )
        nfe, token_forwards = nfe + 1, token_forwards + cost
        at, point = (batch.points[block] == step[:, None]).nonzero(as_tuple=True)
        values = batch.look(value, at, rows, hidden, context, todo) if len(at) else []

        logits = policy.head(hidden[todo])  # (N, V)
        if config.suppress_mask:
            logits[:, policy.mask_token_id] = -torch.inf
        tokens, logprob = draw(logits, config, generator)
        row, column = rows.repeat_interleave(todo.sum(1)), columns[todo]
        chosen = choose(
            commit_score(logits, tokens, logprob, column, config, generator),
            likeliest(logits, ends) & config.end_last,
            None,
            todo,
            batch.targets[block, step] - (~todo).sum(1),
            config,
        )
        batch.write(*(x[chosen] for x in (row, column, tokens, logprob)))
        batch.spent[rows] += batch.cost[rows, block]
        batch.step[rows] += 1
        for judgement in zip(rows[at].tolist(), point.tolist(), values, strict=True):
            batch.judge(*judgement)
        batch.finish_blocks(rows, ends)

    completion = batch.canvas[:, batch.width :]
    mask = policy.completion_mask(completion)
    return GuidedOutput(
        sequences=batch.canvas,
        prompt_mask=batch.attention[:, : batch.width],
        completion_ids=completion,
        completion_mask=mask,
        completions=policy.decode(completion, mask),
        logprobs=batch.logprobs[:, batch.width :],
        nfe=nfe,
        token_forwards=token_forwards,
        optimisations={"value guidance": APPROXIMATE} if thresholds else {},
        values=batch.values,
        judgements=batch.judgements,
        spent=batch.spent,
    )
