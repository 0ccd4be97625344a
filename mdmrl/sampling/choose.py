"""What a denoising step writes at its open positions, and which of them it reveals.

The open positions of all rows lie flat, one after the other: N of them, with logits (N, V), so that
the head and the noise are spent on nothing else. A maximum and a logsumexp take the place of a
softmax over the vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.rules import entropies

CHUNK = 64
TINY = torch.finfo(torch.float32).tiny  # a uniform number may be 0


def reveal(
    policy, logits: Tensor, positions: Tensor, open_: Tensor, quota: Tensor, config, generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token for every open position, and choose those that a step reveals.

    Args:
        logits: (N, V), which it changes; positions: columns of the canvas, (N,); open_, quota: see
            `choose`.
    Returns:
        which of the N are revealed, row by row, and in the order drawn where that is; their tokens
        and log-probabilities; (K,) each.
    """
    if config.suppress_mask:
        logits[:, policy.mask_token_id] = -torch.inf
    tokens, logprobs = draw_tokens(logits, config, generator)
    untempered = logprobs if config.untempered else _at(logits, tokens) - logits.logsumexp(-1)
    scores = config.rule(logits, tokens, untempered, positions, generator)
    if config.order_temperature:
        uniform = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        scores = scores / config.order_temperature - (-uniform.clamp(min=TINY).log()).log()
    postponed = likeliest(logits, list(policy.end_token_ids)) & config.end_last
    spread = None if config.entropy_bound is None else entropies(logits)
    chosen = choose(scores, postponed, spread, open_, quota, config).nonzero()[:, 0]
    if config.order_temperature:
        row = open_.nonzero()[:, 0]
        chosen = chosen[scores[chosen].argsort(descending=True)]
        chosen = chosen[row[chosen].argsort(stable=True)]
    return chosen, tokens[chosen], logprobs[chosen]


def draw_tokens(logits: Tensor, config: SamplerConfig, generator) -> tuple[Tensor, Tensor]:
    """Draw one token from every row of `logits` (N, V), which it shifts, in place, so that each
    row's maximum is 0: log-probabilities near 0 keep their digits.

    Returns:
        tokens and log-probabilities under the tempered and filtered softmax they were drawn from
        (at temperature 0 the most probable token, under softmax(logits)), both (N,).
    """
    best = logits.amax(-1)
    if not best.isfinite().all():
        raise FloatingPointError(
            f"{int((~best.isfinite()).sum())} of {len(best)} positions have logits that are nan or "
            "infinite: the weights have diverged; go back to an earlier checkpoint"
        )
    logits -= best[:, None]
    if config.temperature == 0:
        return logits.argmax(-1), -logits.exp().sum(-1).log()
    tempered = logits
    if not config.untempered:
        tempered = keep_most_probable(logits / config.temperature, config.top_k, config.top_p)
    tokens, total = draw_in_proportion(tempered.exp(), generator)
    return tokens, _at(tempered, tokens) - total.log().to(logits.dtype)


def likeliest(logits: Tensor, among: list[int]) -> Tensor:
    """Rows of `logits` (N, V), as `draw_tokens` leaves them, whose most probable token is one of
    `among`; (N,) bool."""
    return (logits[:, among] == 0).any(-1)


def draw_in_proportion(weights: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw an index from every row of `weights` (N, V), none negative: indices and sums, (N,).

    On a processor noise for every token would cost most of the time; elsewhere float64, which
    cumulative sums need, is slow, or there is none.
    """
    return (by_sums if weights.device.type == "cpu" else by_race)(weights, generator)


def by_race(weights: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """The index whose exponential clock of rate `weights` rings first."""
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / clocks).argmax(-1), weights.sum(-1)


def by_sums(weights: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """The inverse of the cumulative sum at one uniform a row, in float64.

    It goes by chunks and then within one: that is quick, and sums of few terms do not lose the tail
    of a large vocabulary.
    """
    rows = torch.arange(len(weights), device=weights.device)
    if padding := -weights.shape[1] % CHUNK:  # F.pad copies even where it adds nothing
        weights = F.pad(weights, (0, padding))
    chunks = weights.unflatten(1, (-1, CHUNK))  # (N, V / CHUNK, CHUNK)
    sums = chunks.sum(-1).double()
    edges = sums.cumsum(1)
    uniform = torch.rand(rows.shape, generator=generator, dtype=torch.double, device=rows.device)
    height = uniform[:, None] * edges[:, -1:]
    # To the right: an index of weight 0 is never drawn.
    chunk = torch.searchsorted(edges, height, right=True)
    share = 1 - (edges.gather(1, chunk) - height) / sums.gather(1, chunk)  # of the chunk, [0, 1)
    inside = chunks[rows, chunk[:, 0]].double().cumsum(1)
    index = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (CHUNK * chunk + index)[:, 0], edges[:, -1]


def keep_most_probable(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Logits (N, V) with -inf outside the `top_k` most probable tokens, and then outside the
    smallest set of them that holds the probability `top_p`."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what comes before already holds top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return logits


def choose(
    scores: Tensor, postponed: Tensor, spread: Tensor | None, open_: Tensor, quota: Tensor, config
) -> Tensor:
    """Which of the open positions a step reveals, (N,) bool.

    Args:
        scores: of the commit rule, (N,); postponed: to be revealed after all others, (N,) bool.
        spread: entropies, (N,), needed for an entropy bound alone.
        open_: the rows' open positions, (R, M) bool with N of them True.
        quota: how many each row reveals, (R,), where neither threshold nor bound says.
    """

    def table(values: Tensor, elsewhere: float) -> Tensor:  # (N,) -> (R, M)
        return values.new_full(open_.shape, elsewhere).masked_scatter(open_, values)

    last = table(postponed, False)
    last &= (open_ & ~last).any(1, keepdim=True)  # a row with no others reveals them now
    scores = table(scores, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    turn = torch.where(open_, last.int(), 2).gather(1, order)
    order = order.gather(1, turn.argsort(dim=1, stable=True))
    rank = order.argsort(1)
    if config.threshold is not None:
        chosen = (scores >= math.log(config.threshold)) & ~last | (rank == 0)
    elif config.entropy_bound is not None:
        # Their sum without the largest: of each and the largest before it, the smaller counts.
        ranked = table(spread, 0).gather(1, order)
        before = F.pad(ranked.cummax(1).values[:, :-1], (1, 0))
        spent = torch.minimum(ranked, before).cumsum(1)
        chosen = (spent <= config.entropy_bound).gather(1, rank) & ~last
    else:
        chosen = rank < quota[:, None]
    return chosen[open_]


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[..., None])[..., 0]
