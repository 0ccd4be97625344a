"""The toy of notebook 01: texts of a Markov chain, so few that every loss of masked diffusion is an
exact sum over all of them, and a network small enough to train on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdmrl import diffusion
from mdmrl.diffusion import SCHEDULES, MaskedNLL
from mdmrl.diffusion_exact import Denoiser, chain_log_likelihood, conditionals, exact_masked_nll
from mdmrl.runs import generator_for

LINEAR = SCHEDULES["linear"]


@dataclass(frozen=True)
class Chain:
    """All texts of `length` letters of a Markov chain whose first letter is uniform.

    Attributes:
        texts: (N, L); law: their probabilities, (N,).
        mask: the token [MASK], which is also the number of letters.
        entropy: nats a text, in closed form.
        denoisers: the "true conditionals" of the law, the best that training can reach, and an
            "arbitrary table" of random answers on every canvas, the worst case for any identity.
    """

    texts: Tensor
    law: Tensor
    mask: int
    entropy: float
    denoisers: dict[str, Denoiser]

    @classmethod
    def drawn(cls, letters: int, length: int, seed: int) -> Chain:
        draw = generator_for(seed, "toy")
        moves = (2 * torch.randn(letters, letters, generator=draw)).double().softmax(-1)
        texts = torch.cartesian_prod(*[torch.arange(letters)] * length)
        law = moves[texts[:, :-1], texts[:, 1:]].prod(-1) / letters
        state, entropy = torch.full_like(moves[0], 1 / letters), math.log(letters)
        for _ in range(length - 1):
            entropy -= (state @ (moves * moves.log()).sum(1)).item()
            state = state @ moves
        table = 2 * torch.randn((letters + 1,) * length + (length, letters), generator=draw)
        table = F.pad(table.double().log_softmax(-1), (0, 1), value=-torch.inf)
        known = conditionals(law.reshape((letters,) * length))
        denoisers = {"true conditionals": known, "arbitrary table": lambda xt: table[xt.unbind(-1)]}
        return cls(texts, law, letters, entropy, denoisers)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Texts, (count, L)."""
        return self.texts[self.law.multinomial(count, replacement=True, generator=generator)]

    def masked_nll(self, denoiser: Denoiser, block_length: int | None = None) -> MaskedNLL:
        """The function c of `mdmrl.diffusion`, its mean over texts: (K,) to nats, (K,)."""
        exact = exact_masked_nll(denoiser, self.texts, self.mask, block_length)
        return lambda alpha: self.law @ exact(alpha)

    def bounds(self, denoiser: Denoiser, step_counts: Sequence[int]) -> pd.DataFrame:
        """A row for each number of steps T: log p, its bound, the bound without its reconstruction
        term, that term, and the limit of many steps, in nats a text."""
        nll, rows = self.masked_nll(denoiser), []
        limit = -diffusion.limit_loss(nll, LINEAR).item()
        for steps in step_counts:
            terms = diffusion.discrete_terms(nll, LINEAR, steps)
            log_p = chain_log_likelihood(denoiser, self.texts, self.mask, LINEAR, steps)
            row = {"T": steps, "log p": (self.law @ log_p).item(), "ELBO": -terms.sum().item()}
            row |= {"-L_T alone": terms[1:].neg().sum().item(), "reconstruction": terms[0].item()}
            rows.append(row | {"limit": limit})
        return pd.DataFrame(rows)

    def block_bounds(self, denoiser: Denoiser, step_counts: Sequence[int]) -> pd.DataFrame:
        """The loss in `blocks`, a row for each number that divides the text, at every T and in the
        limit, in nats a text."""
        rows, length = [], self.texts.shape[1]
        for blocks in [n for n in range(1, length + 1) if length % n == 0]:
            nll = self.masked_nll(denoiser, length // blocks)
            at = {n: diffusion.discrete_terms(nll, LINEAR, n).sum().item() for n in step_counts}
            row = {"blocks": blocks} | {f"T = {n}": loss for n, loss in at.items()}
            rows.append(row | {"limit": diffusion.limit_loss(nll, LINEAR).item()})
        return pd.DataFrame(rows)

    def limits(self, denoiser: Denoiser, seed: int, batches: int = 100) -> dict[str, str]:
        """L_inf by every schedule, by the log-SNR form and, from `batches` of 1,000 canvases, as
        training estimates it, with its standard error; in nats a text."""
        nll = self.masked_nll(denoiser)
        exact = {f"limit, {n}": diffusion.limit_loss(nll, s) for n, s in SCHEDULES.items()}
        exact["log-SNR form"] = diffusion.log_snr_loss(nll)
        draws = (generator_for(seed, "estimate", batch) for batch in range(batches))
        losses = [self.training_loss(denoiser, 1000, draw).item() for draw in draws]
        estimate = f"{mean(losses):.4f} ± {stdev(losses) / math.sqrt(batches):.4f}"
        said = {form: f"{value.item():.10f}" for form, value in exact.items()}
        return said | {"training estimate": estimate}

    def training_loss(self, denoiser: Denoiser, count: int, generator: torch.Generator) -> Tensor:
        """What pre-training minimises, of `count` texts drawn anew, in nats a text."""
        x0 = self.sample(count, generator)
        everywhere = torch.ones_like(x0, dtype=torch.bool)
        t, weight = diffusion.sample_times(count, generator)
        xt, masked = diffusion.mask_tokens(x0, t, everywhere, self.mask, generator)
        nll = F.cross_entropy(denoiser(xt)[masked], x0[masked], reduction="none")
        return x0.shape[1] * diffusion.linear_elbo_loss(nll, masked, weight, everywhere)


class Network(nn.Module):
    """A bidirectional transformer from canvases (B, L) to log mu (B, L, letters + 1)."""

    def __init__(self, letters: int, length: int, width: int = 32, layers: int = 2):
        super().__init__()
        self.states = (letters + 1,) * length
        self.token = nn.Embedding(letters + 1, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        shape = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, **shape)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, letters))

    def forward(self, xt: Tensor) -> Tensor:
        hidden = self.body(self.token(xt) + self.position)
        return F.pad(self.head(hidden).log_softmax(-1), (0, 1), value=-torch.inf)

    @torch.no_grad()
    def tabulated(self) -> Denoiser:
        """Its answers on every canvas, as they are now."""
        canvases = torch.cartesian_prod(*map(torch.arange, self.states))
        answers = self(canvases).double().unflatten(0, self.states)
        return lambda xt: answers[xt.unbind(-1)]
