"""Why RL at few steps can move accuracy there: what of a text is certain before it is written.

Positions that one step reveals are drawn apart, each from its own distribution. They agree if those
are sharp, so that one of the many right texts is all that is left, or if they are independent as it
is. Two measurements tell which: how a policy spreads its probability over an item's right texts,
exactly; and how probable tokens are that were drawn side by side, before and after the others are
seen.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import entr
from torch import Tensor

from mdmrl.policies import Policy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.choose import choose, likeliest
from mdmrl.sampling.denoise import Canvas
from mdmrl.sampling.schedule import revealed_after
from mdmrl.tasks.countdown import solutions

ROWS = 256  # of one forward pass


def right_solutions(policy: Policy, rows: Sequence[dict], sampler: SamplerConfig) -> pd.DataFrame:
    """Of each row, an item of Countdown: `right`, the probability that a right expression is drawn
    at temperature 1 in the sampler's steps, and `entropy`, in nats, of which one it then is.

    All right expressions count (`solutions`). Positions are revealed as `state_confidence` does,
    whatever the sampler's rule, since a text's probability is then known.
    """
    asked = [(row["nums"], row["target"]) for row in rows]
    known = [(i, text) for i, item in enumerate(asked) for text in solutions(*item)]
    items, texts = zip(*known, strict=True)
    prompts = [rows[i]["prompt"] for i in items]
    parts = [slice(start, start + ROWS) for start in range(0, len(texts), ROWS)]
    logp = torch.cat([text_logprobs(policy, prompts[now], texts[now], sampler) for now in parts])
    logp, of = pd.Series(logp.double().cpu().numpy()), np.array(items)
    p = np.exp(logp - logp.groupby(of).transform("max"))  # of a collapsed policy all may underflow
    entropy = pd.Series(entr(p / p.groupby(of).transform("sum"))).groupby(of).sum()
    return pd.DataFrame({"right": np.exp(logp).groupby(of).sum(), "entropy": entropy})


@torch.no_grad()
def text_logprobs(
    policy: Policy, prompts: Sequence[Prompt], texts: Sequence[str], sampler: SamplerConfig
) -> Tensor:
    """log of the probability of each text behind its prompt at temperature 1, (B,): of a masked
    diffusion policy on a canvas that end tokens fill up, as it was trained on, revealed in the
    sampler's steps by `state_confidence`, which leads to a text in one way."""
    length = sampler.max_new_tokens
    canvas = Canvas.behind(policy.encode(prompts, length), length, policy.pad_token_id)
    ids, attention, open_, width = canvas
    end = policy.tokenizer.eos_token_id
    filled = [row + [end] * (length - len(row)) for row in policy.tokenize(texts)]
    x0 = torch.tensor(filled, device=ids.device)  # (B, L)
    ids[:, width:], open_ = x0, open_[:, width:].clone()
    if not policy.denoises:
        logp = policy.logits(ids, attention)[:, width:].log_softmax(-1)
        logp = logp.gather(-1, x0[..., None])[..., 0]
        return (logp * policy.completion_mask(x0)).sum(1)
    sampler = sampler.replace(remasking="state_confidence")
    total = torch.zeros(len(ids), device=ids.device)
    asked, steps = open_.sum(1), sampler.denoising_steps
    for done in revealed_after(sampler.step_sizes, asked, steps):
        ids[:, width:] = x0.masked_fill(open_, policy.mask_token_id)
        logits = policy.head(policy.forward(ids, attention)[:, width:][open_])  # (N, V)
        logits[:, policy.mask_token_id] = -torch.inf
        logits -= logits.amax(-1, keepdim=True)
        logp = logits.log_softmax(-1)
        postponed = likeliest(logits, list(policy.end_token_ids)) & sampler.end_last
        quota = done - asked + open_.sum(1)
        chosen = choose(logp.amax(-1), postponed, None, open_, quota, sampler)
        now = torch.zeros_like(open_).masked_scatter(open_, chosen)
        drawn = logp[chosen].gather(1, x0[now][:, None])[:, 0]
        total += torch.zeros_like(now, dtype=drawn.dtype).masked_scatter(now, drawn).sum(1)
        open_ &= ~now
    return total


@torch.no_grad()
def agreement(
    policy: Policy, prompts: Sequence[Prompt], sampler: SamplerConfig, seed: int
) -> dict[str, float]:
    """The mean probability of tokens that a step of the sampler drew beside others, one completion
    a prompt: `alone`, as they were drawn, and `together`, once the others of the step are seen.
    What comes behind the end, and what a step drew as the only one, does not count; nan where
    nothing does."""
    generator = generator_for(seed, "agreement", device=policy.device)
    own = sampler.replace(stop_at_end=False)
    output = generate(policy, prompts, own, generator, record=True)
    x0, length = output.completion_ids, sampler.max_new_tokens
    when = torch.empty_like(x0)  # the step of each position
    for index, step in enumerate(output.trajectory):
        when[step.rows, step.positions] = index
    real = torch.cat([output.prompt_mask, torch.ones_like(x0, dtype=torch.bool)], 1)
    before, itself = when[:, None] < when[:, :, None], torch.eye(length, dtype=torch.bool)
    beside = (when[:, None] == when[:, :, None]) & ~itself.to(x0.device)  # (B, L of j, L of k)
    counted = output.completion_mask & (beside & output.completion_mask[:, None]).any(-1)

    if not counted.any():
        return {"alone": math.nan, "together": math.nan}

    def probability(seen: Tensor) -> float:
        """Of the tokens that count, given what is `seen` for each, (B, L, L)."""
        xt = torch.where(seen, x0[:, None], policy.mask_token_id)[counted]  # (N, L)
        row, column = counted.nonzero().T
        width = real.shape[1] - length
        canvas = torch.cat([output.sequences[row, :width], xt], 1)
        hidden = policy.forward(canvas, real[row])[torch.arange(len(row)), width + column]
        logits = policy.head(hidden).index_fill(-1, x0.new_tensor(policy.mask_token_id), -torch.inf)
        p = logits.softmax(-1).gather(1, x0[row, column][:, None])
        return p.mean().item()

    return {"alone": probability(before), "together": probability(before | beside)}
