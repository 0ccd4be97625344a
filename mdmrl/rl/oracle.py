"""What the estimators of `mdmrl.rl.logprobs` estimate, exactly, for texts that can be enumerated.

A text of n tokens has 2^n contexts, one for every set of masked tokens. From the conditionals there
follow, by dynamic programming over the sets, the probability that a sampler writes the text, summed
over all the ways in which it can, and what bounds it.

    law("random", n)             any-order log p: log E prod_k p(x_k | those before), over orders
    law("random", S)             random positions in S steps: over ordered partitions
    law("sequential", n)         left to right
    law("state_confidence", S)   ranked by the largest probability: one way for every text
    law("low_confidence", S)     LLaDA's rule, ranked by the probability of the token just drawn
    law(anything, 1)             all at once, each token on its own
    elbo()                       E sum_k log p(x_k | those before), over orders

In blocks (block diffusion) all this holds for each block given the clean ones before it, and the
logarithms add up; S and n are those of one block.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mdmrl.config import require, unknown
from mdmrl.diffusion_exact import Denoiser, canvases, sets
from mdmrl.policies import Policy, Prompt
from mdmrl.rl.choice import log_binomial
from mdmrl.rl.estimators import gauss_legendre
from mdmrl.sampling.schedule import revealed_after

RULES = ("random", "sequential", "state_confidence", "low_confidence")
CHUNK = 256  # canvases a call of the denoiser


class Oracle:
    """Exact log-probabilities of texts; every method returns nats in float64, (N,).

    Differentiable where the denoiser is, but for the probability that `low_confidence` chooses
    these positions, which counts as a constant.

    Args:
        denoiser: canvases (C, L) to log-probabilities (C, L, V), in float64.
        x0: texts, (N, L), in blocks of n = `block_length`, at most 12 and by default L. The
            denoiser is called with N L/n 2^n canvases.
    """

    def __init__(
        self, denoiser: Denoiser, x0: Tensor, mask_token_id: int, block_length: int | None = None
    ):
        self.n = n = block_length or x0.shape[1]
        require(n <= 12, f"{n} tokens have 2^{n} contexts: expected at most 12 tokens")
        self.denoiser, self.x0, self.mask_token_id = denoiser, x0, mask_token_id
        self.masked = sets(n)  # (2^n, n)
        self.size = self.masked.sum(-1)

        def known(log_mu: Tensor, logp: Tensor) -> Tensor:
            return torch.stack([logp, log_mu.amax(-1)], -1)

        # Of K blocks: log p(x_i | set) and log max_v p(v at i | set), both (K, N, 2^n, n).
        self.logp, self.best = self._read(known).unbind(-1)

    @cached_property
    def less(self) -> Tensor:
        """The probability that what is drawn at j is less probable than x_i, given a set,
        (K, N, 2^n, n of j, n of i)."""

        def below(log_mu: Tensor, logp: Tensor) -> Tensor:
            p = log_mu.exp()
            levels = [(p * (log_mu < level[:, None, None])).sum(-1) for level in logp.unbind(-1)]
            return torch.stack(levels, -1)

        with torch.no_grad():
            return self._read(below)

    def _read(self, table: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`table(log_mu, logp)` of the canvases (C, L) of every block and set: log_mu (C, n, V) at
        the block, of that logp (C, n) of the true tokens; (K, N, 2^n, ...)."""
        blocks = []
        for block, xt in canvases(self.x0, self.mask_token_id, self.n):
            shape, parts = xt.shape[:2], []
            true = self.x0[:, None, block].expand(*shape, -1).flatten(0, 1)
            for some, tokens in zip(xt.flatten(0, 1).split(CHUNK), true.split(CHUNK), strict=True):
                log_mu = self.denoiser(some)[:, block]
                parts.append(table(log_mu, log_mu.gather(-1, tokens[..., None]).squeeze(-1)))
            blocks.append(torch.cat(parts).unflatten(0, shape))
        return torch.stack(blocks)

    def law(self, rule: str, steps: int, step_sizes: str | Sequence[int] = "equal") -> Tensor:
        """log p of the sampler that shares the positions of a block out over `steps` steps, by
        `SamplerConfig.step_sizes`, and in each reveals those that `rule` ranks first."""
        require(1 <= steps <= self.n, f"steps={steps}: expected 1 to {self.n}")
        done = revealed_after(step_sizes, torch.tensor([self.n]), steps)[:, 0]
        left = [self.n, *(self.n - done).tolist()]
        rest = self.logp.new_zeros(*self.logp.shape[:2], 1)  # log p of what is masked, from the end
        for after, before in pairwise(reversed(left)):
            after, before = self.size == after, self.size == before
            where = (slice(None), slice(None), before, None)
            moves = self._moves(rule, where, self.masked[before, None], self.masked[after])
            rest = (moves + rest[:, :, None]).logsumexp(-1)
        return rest.squeeze(-1).sum(0)

    def trajectory(self, revealed_at: Tensor, rule: str | None = None) -> Tensor:
        """log of the probability that the steps which reveal the positions in the order of
        `revealed_at` (N, L) write these tokens, and with a `rule` also choose these positions."""
        when = revealed_at.unflatten(1, (-1, self.n)).transpose(0, 1)  # (K, N, n)
        blocks, rows = torch.arange(len(when))[:, None], torch.arange(when.shape[1])
        total = torch.zeros((), dtype=torch.float64)
        for step in revealed_at.unique():
            before = when >= step
            sets = (before * 2 ** torch.arange(self.n)).sum(-1)
            total = total + self._moves(rule, (blocks, rows, sets), before, when > step).sum(0)
        return total

    def _moves(self, rule: str | None, where: tuple, before: Tensor, after: Tensor) -> Tensor:
        """log-probability that a step from the set `before` reveals the true tokens outside the set
        `after`; both (..., n), and `where` the tables hold what is known at `before`."""
        revealed = before & ~after
        count = revealed.sum(-1)
        logp = self.logp[where]
        tokens = torch.where(revealed, logp, 0).sum(-1)
        if rule is None:
            choice = torch.zeros((), dtype=torch.float64)
        elif rule == "random":
            choice = -log_binomial(before.sum(-1).double(), count.double())
        elif rule in ("sequential", "state_confidence"):
            score = (
                self.best[where] if rule == "state_confidence" else -torch.arange(self.n).double()
            )
            score = torch.where(before, score, -torch.inf)
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            first = before & (rank < count[..., None])
            choice = torch.where((revealed == first).all(-1), 0, -torch.inf)
        elif rule == "low_confidence":
            least = torch.where(revealed, logp, torch.inf).argmin(-1)[..., None, None]
            less = self.less[where].expand(*least.shape[:-2], -1, -1)
            less = less.take_along_dim(least, -1).squeeze(-1)
            others = after & (count > 0)[..., None]
            choice = torch.where(others, less.log(), 0).sum(-1)
        else:
            raise unknown("rule", rule, RULES)
        possible = ~(after & ~before).any(-1)
        return torch.where(possible, tokens + choice, -torch.inf)

    def elbo(self) -> Tensor:
        """E sum_k log p(x_k | those before x_k) over orders."""
        return self._sum(self._shares()[:, None] * self.logp)

    def upper_bound(self, b: float | None = None) -> Tensor:
        """1/b sum_i log E p(x_i | those before it)^b over orders; b = n unless given. Not below the
        any-order log p for b >= n."""
        b = b or self.n
        powers = self._shares().log()[:, None] + b * self.logp
        return powers.masked_fill(~self.masked, -torch.inf).logsumexp(-2).sum((0, -1)) / b

    def quadrature(self, nodes: int) -> Tensor:
        """The ELBO as an integral over t, by the Gauss-Legendre rule."""
        return self._over_time(*gauss_legendre(nodes))

    def coupled(self) -> Tensor:
        """Half of log p of the one-step law, plus the ELBO's mean over t in (0.2, 0.8)."""
        times, weights = gauss_legendre(self.n, 0.2, 0.8)
        return self.law("random", 1) / 2 + self._over_time(times, [w / 0.6 for w in weights])

    def _shares(self) -> Tensor:
        """The share of orders in which a set is what is still masked when the turn of a given one
        of its tokens comes, 1 / (n over |S|) / |S|, (2^n,)."""
        size = self.size.clamp(min=1).double()
        return (-log_binomial(torch.tensor(self.n), size)).exp() / size * (self.size > 0)

    def _over_time(self, times: list[float], weights: list[float]) -> Tensor:
        """sum_k w_k/t_k E sum_{i in m} log p(x_i | m), each token in m with probability t_k."""
        t, w = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (times, weights))
        chance = t**self.size * (1 - t) ** (self.n - self.size)  # (k, 2^n)
        return self._sum((w / t * chance).sum(0)[:, None] * self.logp)

    def _sum(self, values: Tensor) -> Tensor:
        """Over blocks, sets and their masked tokens."""
        return torch.where(self.masked, values, 0).sum((0, -2, -1))


def denoiser_of(
    policy: Policy, prompt: Prompt, length: int, temperature: float = 1.0, suppress_mask=True
) -> Denoiser:
    """The policy as a denoiser of completions of `prompt`, with the sampler's `temperature`; behind
    a text that is shorter than the canvas of `length` all stays [MASK]."""
    ids = policy.encode([prompt], length).input_ids
    width = ids.shape[1]

    def denoiser(xt: Tensor) -> Tensor:
        behind = xt.new_full((len(xt), length - xt.shape[1]), policy.mask_token_id)
        written = torch.cat([xt, behind], 1).to(policy.device)
        canvas = torch.cat([ids.expand(len(xt), -1), written], 1)
        hidden = policy.forward(canvas, pattern=policy.pattern(width, length))
        logits = policy.head(hidden[:, width : width + xt.shape[1]]).cpu().double() / temperature
        if suppress_mask:
            mask = torch.arange(logits.shape[-1]) == policy.mask_token_id
            logits = logits.masked_fill(mask, -torch.inf)
        return logits.log_softmax(-1)

    return denoiser


def tabulate(denoiser: Denoiser, states: int, length: int) -> Denoiser:
    """The same denoiser, asked once for each of the canvases, ids being below `states`."""
    canvases = torch.cartesian_prod(*[torch.arange(states)] * length).view(-1, length)
    table = torch.cat([denoiser(part) for part in canvases.split(CHUNK)])
    strides = states ** torch.arange(length - 1, -1, -1)
    return lambda xt: table[(xt * strides).sum(-1)]


def all_texts(policy: Policy, length: int) -> Tensor:
    """Every text of `length` tokens, [MASK] excepted, (N, L)."""
    ids = torch.arange(policy.model.config.vocab_size)
    ids = ids[ids != policy.mask_token_id]
    return torch.cartesian_prod(*[ids] * length).view(-1, length)
