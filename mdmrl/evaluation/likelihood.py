"""How probable a policy finds a text behind another, for every family.

Exact for an autoregressive policy. For a denoiser it is the ELBO of the n tokens of the text x,

    E_{l ~ U{1..n}} E_m  n/l  sum_{i in m} log p(x_i | context, x without m),

m being a random set of l tokens (Nie et al. 2025, LLaDA, eq. 6), and a lower bound. A policy with
blocks has the sum over blocks, each given the clean blocks before it.
"""

import math
import zlib
from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from mdmrl.diffusion_exact import sets
from mdmrl.policies import Policy
from mdmrl.policies.patterns import hidden_beside
from mdmrl.runs import generator_for

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation, one at least


@torch.no_grad()
def log_likelihoods(
    policy: Policy,
    pairs: Sequence[Pair],
    n_mc: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """Log-likelihoods of continuations in nats, and whether greedy decoding gives them: for a
    denoiser one token a pass, the surest of those open in the first open block.

    Args:
        n_mc: masked sets that a continuation, or a block of it, is scored with. Where it has no
            more than so many (7 tokens have 127), the ELBO is exact; else an unbiased estimate.
        seed: of the masked sets. They depend on it, the context and the number of tokens alone, so
            that policies, and continuations of one length, are compared on the same.
        batch_size: texts, each with one masked set, in a forward pass.
    """
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    greedy = torch.ones(len(pairs), dtype=torch.bool)
    longest_first = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    shown = tqdm(longest_first, "log-likelihoods", disable=None if progress else True)
    rows = ((i, *row) for i in shown for row in _masked_sets(policy, pairs[i], n_mc, seed))
    while batch := list(islice(rows, batch_size)):
        numbers, masked, weights = zip(*batch, strict=True)
        logits, tokens = _predict(policy, [pairs[i] for i in numbers], masked)
        logps = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
        of = torch.tensor(numbers).repeat_interleave(torch.stack([m.sum() for m in masked]))
        counted = torch.cat([w[m] for w, m in zip(weights, masked, strict=True)])
        totals.index_add_(0, of, counted * logps.double().cpu())
        greedy[of[(logits.argmax(1) != tokens).cpu()]] = False
    if policy.denoises:
        for start in range(0, len(pairs), batch_size):
            chosen = longest_first[start : start + batch_size]
            greedy[chosen] = _decoded_greedily(policy, [pairs[i] for i in chosen])
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))


def elbo_sets(n: int, n_mc: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sets m of masked tokens out of n, (K, n) bool, and weights (K, n), with which log p(x_i | x
    without m), summed over all m and i in m, is the ELBO or has it as its expectation.

    All sets but the empty one where that is no more than `n_mc`; else so many random ones, their
    sizes from strata, which lowers the variance.
    """
    if 2**n - 1 <= n_mc:
        masked = sets(n)[1:]
        size = masked.sum(1, keepdim=True)
        alike = torch.tensor([[math.comb(n, int(s))] for s in size])
        return masked, (1 / (size * alike).double()).expand(-1, n)
    u = torch.rand(n_mc, 1, generator=generator, dtype=torch.float64)
    size = 1 + ((torch.arange(n_mc)[:, None] + u) / n_mc * n).long().clamp(max=n - 1)
    rank = torch.rand(n_mc, n, generator=generator).argsort(1).argsort(1)
    return rank < size, (n / (size * n_mc).double()).expand(-1, n)


def whole_blocks(policy: Policy, length: int) -> int:
    """`length` rounded up to what the policy can have behind a prompt."""
    block = policy.block_length or 1
    return -(-length // block) * block


def _masked_sets(policy: Policy, pair: Pair, n_mc: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`elbo_sets` of every block, one beside the other; for an autoregressive policy the one set is
    all tokens, each given those before it."""
    context, continuation = pair
    n = len(continuation)
    if not policy.denoises:
        return [(torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.float64))]
    index = zlib.crc32(repr(context).encode())
    generator = generator_for(seed, "log-likelihood", index=index)
    block = policy.block_length or n
    sizes = [min(block, n - start) for start in range(0, n, block)]
    parts = [elbo_sets(size, n_mc, generator) for size in sizes]
    most = max(len(masked) for masked, _ in parts)
    padded = [[F.pad(x, (0, 0, 0, most - len(x))) for x in part] for part in parts]
    masked, weights = (torch.cat(columns, 1) for columns in zip(*padded, strict=True))
    return list(zip(masked, weights, strict=True))


def _predict(
    policy: Policy, pairs: Sequence[Pair], masked: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of the `masked` tokens of each continuation, and these tokens (N,), row by row.

    A block that a continuation ends in is filled up with masks, as a sampler sees it.
    """
    contexts = policy.pad([context for context, _ in pairs])
    width, most = contexts.input_ids.shape[1], max(len(tokens) for _, tokens in pairs)
    shape = len(pairs), whole_blocks(policy, most)
    fill = policy.mask_token_id if policy.denoises else policy.pad_token_id
    tokens, real = torch.full(shape, fill), torch.zeros(shape, dtype=torch.bool)
    open_ = torch.zeros_like(real)
    for row, ((_, continuation), m) in enumerate(zip(pairs, masked, strict=True)):
        n = len(continuation)
        tokens[row, :n], real[row, :n], open_[row, :n] = torch.tensor(continuation), True, m
    tokens, real, open_ = (x.to(policy.device) for x in (tokens, real, open_))
    seen = tokens.masked_fill(open_, policy.mask_token_id) if policy.denoises else tokens
    pattern = policy.pattern(width, shape[1])
    if pattern is None:
        attention = torch.cat([contexts.attention_mask, real], 1)
        hidden = policy.forward(torch.cat([contexts.input_ids, seen], 1), attention)[:, width:]
    else:
        clean = torch.cat([contexts.input_ids, tokens], 1)
        attention = F.pad(contexts.attention_mask, (0, shape[1]), value=True)
        columns = torch.arange(width, width + shape[1], device=policy.device)
        hidden = hidden_beside(policy, clean, attention, pattern, seen, columns)[1]
    logits = policy.head(hidden[open_])
    if policy.denoises:
        logits[:, policy.mask_token_id] = -math.inf  # as the samplers
    return logits, tokens[open_]


def _decoded_greedily(policy: Policy, pairs: Sequence[Pair]) -> Tensor:
    """Whether each continuation is what a denoiser decodes, (B,) bool; see above.

    The surest of all blocks is the surest of its own, and a block's tokens depend on how far that
    block is alone, the ones before it being in sight as they are written.
    """
    open_ = [torch.ones(len(continuation), dtype=torch.bool) for _, continuation in pairs]
    greedy = torch.ones(len(pairs), dtype=torch.bool)
    while rows := [i for i, todo in enumerate(open_) if greedy[i] and todo.any()]:
        still = [open_[i] for i in rows]
        logits, tokens = _predict(policy, [pairs[i] for i in rows], still)
        counts = [int(todo.sum()) for todo in still]
        surest, best = logits.log_softmax(1).max(1)
        found = zip(surest.split(counts), (best == tokens).split(counts), strict=True)
        for i, (logps, right) in zip(rows, found, strict=True):
            chosen = int(logps.argmax())
            open_[i][open_[i].nonzero()[chosen]], greedy[i] = False, bool(right[chosen])
    return greedy
