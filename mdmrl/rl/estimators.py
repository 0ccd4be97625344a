"""The estimators of `mdmrl.rl.logprobs`, each a function `f(policy, rollout, noise)`.

Notation: x_1 .. x_n are the tokens that count, those of the rollout's completion mask; p(x_i | m)
is the policy's probability of x_i where the set m of them is masked. What does not count, behind
the end of the text, is always [MASK]; for `trajectory` everything counts. Several samples are
averaged.

Block diffusion has log p(x) = sum_b log p(x^b | x^<b): every formula holds for each block on its
own, n being the tokens of the block, and is summed over blocks. One pass scores all blocks, since
none sees a later one.

`clean_text` and `one_step` leave [MASK] in the softmax; all others give it probability 0
where the sampler did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.policies.patterns import hidden_beside
from mdmrl.rl.choice import log_choice
from mdmrl.rl.rollout import Rollout

STATES_AT_ONCE = 64  # of a trajectory, in one forward pass


@dataclass
class Noise:
    """Randomness that new, old and reference policy share, uniform numbers in [0, 1) of K samples.

    prompt_masked: prompt tokens that `one_step` masks, (B, P) bool. time: how much is masked,
    (B, K, L); the number at a block's first position is the block's. order: what is masked first,
    (B, K, L). reference: noise of the reference policy's own, where it shall not share.
    """

    prompt_masked: Tensor
    time: Tensor
    order: Tensor
    reference: Noise | None = None

    def select(self, chosen: slice | Tensor) -> Noise:
        """The same for some of the rows, a slice or a mask of them."""
        values = (getattr(self, field.name) for field in fields(self))
        cut = [v[chosen] if isinstance(v, Tensor) else v and v.select(chosen) for v in values]
        return Noise(*cut)

    @classmethod
    def joined(cls, parts: Sequence[Noise]) -> Noise:
        """That of several rollouts, one below the other."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.prompt_masked.shape[1] for part in parts)
        masks = (part.prompt_masked for part in parts)
        masked = torch.cat([F.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        times, orders, others = zip(*((p.time, p.order, p.reference) for p in parts), strict=True)
        return cls(masked, torch.cat(times), torch.cat(orders), others[0] and cls.joined(others))


def draw_noise(
    rollout: Rollout, p_mask_prompt: float, generator: torch.Generator, samples=0, shared=True
) -> Noise:
    """Noise of K = `samples`; each real prompt token is masked with probability `p_mask_prompt`."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=rollout.prompt_ids.device)

    batch, length = rollout.completion_ids.shape
    masked = (uniform(*rollout.prompt_ids.shape) < p_mask_prompt) & rollout.prompt_mask
    noise = Noise(masked, *(uniform(batch, samples, length) for _ in ("time", "order")))
    if not shared:
        noise.reference = draw_noise(rollout, p_mask_prompt, generator, samples)
    return noise


# -- one pass --------------------------------------------------------------------------------------


def clean_text(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """log p(x_i | x_<i) of an autoregressive policy (`exact`), (B, L). For a masked diffusion model
    the thesis makes the same call: log p(x_i | the completion itself)."""
    return _score(policy, rollout, rollout.prompt_ids, rollout.completion_ids)


def one_step(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """log p(x_i | all masked, and of the prompt what the noise says), (B, L) (Zhao et al. 2025,
    d1)."""
    prompt = torch.where(noise.prompt_masked, policy.mask_token_id, rollout.prompt_ids)
    blank = torch.full_like(rollout.completion_ids, policy.mask_token_id)
    return _score(policy, rollout, prompt, blank)


# -- the ELBO, and what resembles it ---------------------------------------------------------------


def elbo(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """(n/l) sum_{i in m} log p(x_i | m), l ~ U{1..n} and m a random set of l tokens, (B,) (Nie et
    al. 2025, LLaDA; Zhu et al. 2025, LLaDA 1.5, VRPO)."""
    total = 0.0
    for sample in _samples(policy, rollout, noise):
        count = 1 + (sample.time * sample.size).long()
        logps = _masked_logps(policy, rollout, sample.rank < count)
        total = total + (logps * sample.size / count).sum(1)
    return total / noise.time.shape[1]


def random_mask(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """n times the mean over i in m of log p(x_i | m), m a random share t ~ U(0, 1) of tokens, (B,)
    (Yang et al. 2025, MMaDA, UniGRPO).

    Such a set, unless it is empty, is one of l ~ U{1..n} tokens: the mean estimates ELBO / n, and
    times n, as all estimators are in nats a text, this *is* an estimate of the ELBO.
    """
    return elbo(policy, rollout, noise)


def complementary(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """(n+1)/2 [sum_{i in m} log p(x_i|m) / l + sum_{i not in m} log p(x_i|not m) / (n-l)], (B,).

    m has l ~ U{0..n} tokens: each pair scores every token once, which has less variance than two
    such sets drawn apart (Ou et al. 2025, ESPO). An empty set gives 0; for what that costs see
    `overlapping`.
    """
    total = sum((weight * logps).sum(1) for logps, weight in _pairs(policy, rollout, noise))
    return total / noise.time.shape[1]


def overlapping(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """The mean of two draws of `elbo`, the first l ~ U{1..n} tokens of a random order and its last
    n + 1 - l, which have one token in common, (B,).

    The idea of `complementary` without empty sets: there the pair of the empty and the whole set
    has half the weight of others, which by itself makes a relative error of about 1/sqrt(2n), and
    often more variance than two draws of `elbo`.
    """
    mask, total = rollout.completion_mask, 0.0
    for sample in _samples(policy, rollout, noise):
        count = 1 + (sample.time * sample.size).long()
        rest = (sample.size + 1 - count).clamp(min=1)
        first = _masked_logps(policy, rollout, sample.rank < count) / count
        last = _masked_logps(policy, rollout, mask & (sample.rank >= count - 1)) / rest
        total = total + ((first + last) * sample.size / 2).sum(1)
    return total / noise.time.shape[1]


def coupled(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """1/2 log p(x_i | all) + 1/2 [log p(x_i | m) / t or log p(x_i | not m) / (1-t)], (B, L).

    The first of the two for i in m; t ~ U(0.2, 0.8), and m has each token with probability t (Gong
    et al. 2025, DiffuCoder).
    """
    mask, total = rollout.completion_mask, 0.0
    for sample in _samples(policy, rollout, noise):
        t = 0.2 + 0.6 * sample.time
        m = mask & (sample.order < t)
        total = total + _masked_logps(policy, rollout, m) / t
        total = total + _masked_logps(policy, rollout, mask & ~m) / (1 - t)
    return (_masked_logps(policy, rollout, mask) + total / noise.time.shape[1]) / 2


def quadrature(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """sum_k w_k/t_k sum_{i in m_k} log p(x_i | m_k), m_k each token with probability t_k, (B,).

    t_k and w_k are the Gauss-Legendre rule of K nodes on (0, 1), exact up to degree 2K - 1; what it
    integrates, the expectation at t, is a polynomial in t of degree n - 1 (Rojas et al. 2025,
    GDPO).
    """
    nodes, total = zip(*gauss_legendre(noise.time.shape[1]), strict=True), 0.0
    for sample, (t, weight) in zip(_samples(policy, rollout, noise), nodes, strict=True):
        m = rollout.completion_mask & (sample.order < t)
        total = total + weight / t * _masked_logps(policy, rollout, m).sum(1)
    return total


def upper_bound(policy: Policy, rollout: Rollout, noise: Noise, b: float | None = None) -> Tensor:
    """1/b sum_i log E[p(x_i | m)^b], m a random set with i in it, (B,); b = n unless given.

    By Hölder's inequality at least the any-order log p if b >= n (Wang et al. 2025, SPG, without
    its constant). The expectation is a weighted mean over the sets of `complementary`, where no
    token goes without; its logarithm is biased downwards.
    """
    size = next(_samples(policy, rollout, noise)).size
    power = size.clamp(min=1).float() if b is None else torch.full_like(noise.time[:, 0], b)
    terms = [w.log() + power * logps for logps, w in _pairs(policy, rollout, noise)]
    log_mean = torch.stack(terms).logsumexp(0) - math.log(len(terms))
    return torch.where(rollout.completion_mask, log_mean / power, 0.0).sum(1)


def gauss_legendre(nodes: int, low: float = 0.0, high: float = 1.0) -> tuple[list, list]:
    """Nodes and weights of the Gauss-Legendre rule on [low, high]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = (high - low) / 2
    return (low + half * (x + 1)).tolist(), (half * w).tolist()


# -- an order of its own ---------------------------------------------------------------------------


def ar_order(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
    """log p(x_i | x_i and all after it masked), (B, L) (Ni et al. 2026, JustGRPO)."""
    mask = rollout.completion_mask
    place = torch.arange(mask.shape[1], device=mask.device) % _block_length(policy, rollout)
    steps = range(int(place[mask.any(0)].max()) + 1)
    each = ((mask & (place >= k), mask & (place == k)) for k in steps)
    return sum(_masked_logps(policy, rollout, *step) for step in each)


def trajectory(policy: Policy, rollout: Rollout, noise: Noise, positions: bool = False) -> Tensor:
    """log p(x_i | what was masked at the step that revealed it), (B, L), at all revealed positions
    (Black et al. 2024, DDPO, for tokens; Wang et al. 2025, TraceRL).

    With `positions`, the sum of these plus the log-probability that the sampler's rule chooses the
    positions it chose, (B,): together that of the whole trajectory. See `log_choice`.
    """
    drawn = rollout.sampler.order_temperature
    require(
        positions or not drawn,
        f"order_temperature={drawn} with logp_estimator='trajectory': which positions are revealed "
        "is drawn too; expected 'trajectory-positions'",
    )
    rollout = rollout.whole()
    mask, n, batch = rollout.completion_mask, _block_length(policy, rollout), len(rollout)
    # No block sees a later one: the first steps of all blocks are one pass, and so on.
    never = torch.iinfo(torch.long).max
    when = torch.where(mask, rollout.revealed_at, never).unflatten(1, (-1, n))
    when = (when - when.amin(-1, keepdim=True)).flatten(1)
    steps, total = torch.arange(int(when[mask].max()) + 1, device=mask.device), 0.0
    for now in steps.split(max(1, STATES_AT_ONCE // batch)):
        rows = torch.arange(batch, device=mask.device).repeat_interleave(len(now))  # a row a state
        states, step = rollout.select(rows), now.repeat(batch)[:, None]
        masked, chosen = when[rows] >= step, mask[rows] & (when[rows] == step)
        scored = masked if positions else chosen
        hidden = _masked_hidden(policy, states, masked)[scored]
        found = _of_tokens(policy, states, hidden, scored).masked_fill(~chosen, 0)
        if positions:
            logits = _drawable(policy, states, policy.head(hidden))
            found = found.sum(1) + log_choice(policy, states, logits, masked, chosen)
        total = total + found.unflatten(0, (batch, -1)).sum(1)
    return total


# -- shared parts ----------------------------------------------------------------------------------


@dataclass
class _Sample:
    """One sample's numbers of the noise, all (B, L); `time` and `size` (n) are those of the block,
    `rank` the place of a token that counts in the random order of its block, from 0."""

    time: Tensor
    order: Tensor
    rank: Tensor
    size: Tensor


def _samples(policy: Policy, rollout: Rollout, noise: Noise) -> Iterator[_Sample]:
    blocks = (-1, _block_length(policy, rollout))
    counts = rollout.completion_mask.unflatten(1, blocks)
    size = counts.sum(-1, keepdim=True).expand(counts.shape).flatten(1)
    for time, order in zip(noise.time.unbind(1), noise.order.unbind(1), strict=True):
        time = time.unflatten(1, blocks)[..., :1].expand(counts.shape).flatten(1)
        rank = order.unflatten(1, blocks).masked_fill(~counts, 2.0).argsort(-1).argsort(-1)
        rank = rank.masked_fill(~counts, order.shape[1]).flatten(1)
        yield _Sample(time, order, rank, size)


def _pairs(policy: Policy, rollout: Rollout, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token scored in a random set m or in its complement, and (n+1) / (2 |its set|), (B, L).

    m has l ~ U{0..n} tokens. So weighted, the sets that a token is masked in are those of `elbo`.
    """
    for sample in _samples(policy, rollout, noise):
        count = (sample.time * (sample.size + 1)).long()
        m = sample.rank < count
        rest = rollout.completion_mask & ~m
        logps = _masked_logps(policy, rollout, m) + _masked_logps(policy, rollout, rest)
        own = torch.where(m, count, sample.size - count).clamp(min=1)
        yield logps, (sample.size + 1) / (2 * own)


def _block_length(policy: Policy, rollout: Rollout) -> int:
    return policy.block_length or rollout.completion_ids.shape[1]


def _masked_logps(
    policy: Policy, rollout: Rollout, masked: Tensor, scored: Tensor | None = None
) -> Tensor:
    """log p(x_i | masked) at `scored`, by default all of `masked`, 0 elsewhere; all (B, L)."""
    scored = masked if scored is None else scored
    return _of_tokens(policy, rollout, _masked_hidden(policy, rollout, masked)[scored], scored)


def _masked_hidden(policy: Policy, rollout: Rollout, masked: Tensor) -> Tensor:
    """`_hidden` where `masked` and what does not count are [MASK]."""
    visible = rollout.completion_mask & ~masked
    canvas = torch.where(visible, rollout.completion_ids, policy.mask_token_id)
    return _hidden(policy, rollout, rollout.prompt_ids, canvas)


def _score(policy: Policy, rollout: Rollout, prompt: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities of the tokens that count, from other tokens as input, (B, L)."""
    scored = rollout.completion_mask
    hidden = _hidden(policy, rollout, prompt, completion)[scored]
    return _of_tokens(policy, rollout, hidden, scored, drawable=False)


def _of_tokens(
    policy: Policy, rollout: Rollout, hidden: Tensor, scored: Tensor, drawable=True
) -> Tensor:
    """Log-probabilities of the rollout's tokens, hidden states (N, H) being of `scored`, (B, L)."""

    def logps(logits: Tensor, tokens: Tensor) -> Tensor:
        logits = (_drawable(policy, rollout, logits) if drawable else logits) / rollout.temperature
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)

    found = torch.cat(policy.of_logits(logps, hidden, rollout.completion_ids[scored]))
    return torch.zeros(scored.shape, device=found.device).masked_scatter(scored, found)


def _drawable(policy: Policy, rollout: Rollout, logits: Tensor) -> Tensor:
    """Logits (N, V) that give [MASK] probability 0 if the sampler does."""
    if not rollout.sampler.suppress_mask:
        return logits
    never = torch.arange(logits.shape[1], device=logits.device) == policy.mask_token_id
    return logits.masked_fill(never, -math.inf)


def _hidden(policy: Policy, rollout: Rollout, prompt: Tensor, completion: Tensor) -> Tensor:
    """Hidden states that predict the completion, `prompt` and `completion` being input, (B, L, H).

    The attention mask is the sampler's: prompt padding hidden, the whole completion visible. Where
    the policy has blocks, each sees itself in `completion`, and the blocks before it as they were
    written, in a clean copy beside: all in one pass (Arriola et al. 2025, BD3-LM).
    """
    width, length = prompt.shape[1], completion.shape[1]
    pattern = policy.pattern(width, length)
    real = torch.cat([rollout.prompt_mask, torch.ones_like(completion, dtype=torch.bool)], 1)
    if pattern is None:
        return policy.forward(torch.cat([prompt, completion], 1), real)[:, width:]
    written = torch.cat([prompt, rollout.completion_ids], 1)
    columns = torch.arange(width, width + length, device=written.device)
    return hidden_beside(policy, written, real, pattern, completion, columns)[1]
