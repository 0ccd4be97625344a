"""Denoising: from [MASK] to text, a few positions a forward pass (Nie et al. 2025, algorithm 5).

The completion is revealed whole, or block by block from left to right. Every step looks at the open
positions of the active block, draws a token for each, and reveals the best-ranked of them
(`mdmrl.sampling.choose`); what of the canvas goes through the network is `mdmrl.sampling.windows`'
business.

Saved against the plain loop, which pushes the full canvas through network and head at each step and
takes a softmax everywhere; all exact, and asserted so in the tests:
 * the head, the noise and the ranking run at open positions of the active block alone;
 * a maximum and a logsumexp in place of a softmax;
 * rows without open positions in the active block are dropped, and steps without any skipped;
 * on a CPU without a key cache, rows go through the network in parts that fit the CPU's own;
 * a row is done once its first end token and all before it are revealed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdmrl.policies import Policy, Prompt, Prompts
from mdmrl.sampling.choose import reveal
from mdmrl.sampling.config import SamplerConfig, require_config
from mdmrl.sampling.output import APPROXIMATE, EXACT, SamplerOutput, Step
from mdmrl.sampling.schedule import evenly, revealed_after
from mdmrl.sampling.windows import Predictor


class Canvas(NamedTuple):
    """Token ids, which of them are real, which are to be revealed ([MASK] in the ids), (B, P+L)
    each, and how many columns the prompt has, P."""

    ids: Tensor
    attention: Tensor
    open_: Tensor
    width: int

    @classmethod
    def behind(cls, prompts: Prompts, length: int, mask_token_id: int) -> Canvas:
        real, width = prompts.attention_mask, prompts.input_ids.shape[1]
        blank = prompts.input_ids.new_full((len(real), length), mask_token_id)
        new = torch.ones_like(blank, dtype=torch.bool)
        ids, open_ = torch.cat([prompts.input_ids, blank], 1), torch.zeros_like(real)
        return cls(ids, torch.cat([real, new], 1), torch.cat([open_, new], 1), width)


def sample(
    policy: Policy, prompts: Sequence[Prompt], config: SamplerConfig, generator, record=False
) -> SamplerOutput:
    """Complete `prompts`; see `mdmrl.sampling.generate`."""
    require_config(config)
    config, length = config.in_blocks_of(policy.block_length), config.max_new_tokens
    canvas = Canvas.behind(policy.encode(prompts, length), length, policy.mask_token_id)
    return denoise(policy, *canvas, config, generator, record)


@torch.no_grad()
def denoise(
    policy: Policy, canvas, attention, open_, width, config: SamplerConfig, generator, record=False
) -> SamplerOutput:
    """Reveal the open positions of a `Canvas`, given by its parts, block by block."""
    device, length = canvas.device, canvas.shape[1] - width
    block_length = policy.block_length or config.block_length or length
    starts = range(width, width + length, block_length)
    network = Predictor(policy, canvas, attention, width, config)
    canvas, asked, open_ = network.canvas, open_, open_.clone()
    logprobs = torch.zeros(canvas.shape, device=device)
    dropped, ended, trajectory = False, False, []

    for a, steps in zip(starts, evenly(config.denoising_steps, len(starts)), strict=True):
        b = a + block_length
        targets = revealed_after(config.step_sizes, asked[:, a:b].sum(1), steps)  # (steps, B)
        for step in itertools.count():
            rows = open_[:, a:b].any(1).nonzero()[:, 0]  # (R,)
            if not len(rows):
                break
            dropped |= len(rows) < len(canvas)
            revised = rows.new_zeros(2, 0)
            if config.revise and step:
                revealed = asked[rows, a:b] & ~open_[rows, a:b]
                row, column = least_sure(logprobs[rows, a:b], revealed, config.revise)
                revised = torch.stack([rows[row], a + column])
                network.write(*revised, policy.mask_token_id)
                open_[tuple(revised)] = True
            todo = open_[rows, a:b]  # (R, b-a), N of them True
            row, column = rows.repeat_interleave(todo.sum(1)), a + todo.nonzero()[:, 1]  # (N,)

            fresh = step == 0 or (config.cache_refresh and step % config.cache_refresh == 0)
            logits = network.logits(rows, todo, a, b, fresh)  # (N, V)
            quota = targets[step, rows] - (asked[rows, a:b] & ~todo).sum(1)
            chosen, tokens, logprob = reveal(policy, logits, column, todo, quota, config, generator)
            row, column = row[chosen], column[chosen]
            network.write(row, column, tokens)
            logprobs[row, column] = logprob
            open_[row, column] = False
            if record:
                revised[1] -= width
                trajectory.append(Step(row, column - width, tokens, logprob, revised))
            # What may be revised is not settled before its block is.
            if config.stop_at_end and not (config.revise and open_[:, a:b].any()):
                before = open_.cumsum(1) == 0  # what is still open
                done = (policy.is_end(canvas) & before)[:, width:].any(1)
                behind = open_ & done[:, None]
                ended |= bool(behind.any())
                canvas[behind] = policy.pad_token_id
                open_ &= ~behind

    saved = (
        ("head at open positions", EXACT, True),
        ("no softmax", EXACT, True),
        ("parallel decoding", APPROXIMATE, config.parallel),
        ("finished rows dropped", EXACT, dropped),
        ("rows end with their text", EXACT, ended),
        ("block cache", EXACT, policy.block_length),
        (f"{config.cache} cache", APPROXIMATE, config.cache),
    )
    costs = {"nfe": network.window.nfe, "token_forwards": network.window.token_forwards}
    costs["optimisations"] = {name: how for name, how, used in saved if used}
    found = {"trajectory": trajectory if record else None, "asked": asked[:, width:]}
    drawn = attention[:, :width], logprobs[:, width:]
    return SamplerOutput.of(policy, canvas, *drawn, **found, **costs)


def least_sure(logprobs: Tensor, revealed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the `count` least probable revealed tokens of each row, or of as many as
    there are."""
    ranked = logprobs.masked_fill(~revealed, torch.inf).argsort(dim=1, stable=True)[:, :count]
    columns = ranked[revealed.gather(1, ranked)]
    return revealed.gather(1, ranked).nonzero()[:, 0], columns
