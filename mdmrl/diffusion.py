"""The mathematics of masked (absorbing-state) diffusion.

The forward process keeps a token with probability alpha_t and replaces it by [MASK] otherwise;
alpha falls from 1 at t = 0 to 0 at t = 1, so the prior is the all-[MASK] sequence. The reverse
process reveals a masked token on the way from t to s < t with probability
(alpha_s - alpha_t) / (1 - alpha_t); which token, is drawn from the model's categorical mu_theta.

Every loss weighs the same function of alpha, the cross-entropy at the masked positions,

    c(alpha) = E_{x_t} [ sum_{i : x_t^i = m}  -log mu_theta^i(x_0^i | x_t) ],

and bounds -log p_theta(x_0) from above, in nats (Shi et al. 2024, section 3):

    T steps   sum_{i = 1..T} (alpha_s - alpha_t) / (1 - alpha_t)  c(alpha_t),  s = (i-1)/T, t = i/T
    limit     integral over t of  -alpha'_t / (1 - alpha_t)  c(alpha_t)
    log-SNR   integral over lambda of  sigma(lambda)  c(sigma(lambda)),  lambda = logit(alpha)

The last knows no schedule: where mu_theta does not depend on t, the limit is the same for all. For
alpha_t = 1 - t the weight of the limit is 1/t (Shi et al. 2024, eq. 8; Sahoo et al. 2024, eq. 10;
Nie et al. 2025, eq. 3). The losses are linear in c, so that with c summed over blocks, each given
the clean blocks before it, the same lines are the losses of block diffusion (Arriola et al. 2025,
section 3).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdmrl.config import require

# -- noise schedules -------------------------------------------------------------------------------


class Schedule(ABC):
    """How the probability of being still unmasked falls with times in [0, 1], of any shape."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is unmasked: alpha(0) = 1, alpha(1) = 0."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """The derivative alpha'(t), nowhere positive."""

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), the rate at which the reverse process reveals; t > 0."""
        return -self.slope(t) / (1 - self.alpha(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log alpha_t / (1 - alpha_t): infinite at 0, minus infinite at 1."""
        return self.alpha(t).logit()


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha_t = 1 - t^power; power 1 is the linear schedule of LLaDA and Dream."""

    power: float = 1.0

    def __post_init__(self) -> None:
        # Below 1 the slope at t = 0 is infinite, which quadrature over t does not survive.
        require(self.power >= 1, f"power={self.power}: expected at least 1")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def slope(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha_t = 1 - cos(pi/2 (1 - t)): MaskGIT's (Chang et al. 2022, section 3.3)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def slope(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))


@dataclass(frozen=True)
class Geometric(Schedule):
    """alpha_t = exp(-b_t), b_t growing geometrically from `least` to `most`, stretched to [0, 1].

    Unstretched (Lou et al. 2024) alpha ends at exp(-most) instead of 0, which leaves a prior term
    in the bound.
    """

    least: float = 1e-5
    most: float = 20.0

    def __post_init__(self) -> None:
        ends = f"least={self.least}, most={self.most}"
        require(0 < self.least < self.most, f"{ends}: expected 0 < least < most")

    def _noise(self, t: Tensor) -> Tensor:
        return self.least ** (1 - t) * self.most**t

    def _stretched(self, kept: Tensor) -> Tensor:
        return kept / (math.exp(-self.least) - math.exp(-self.most))

    def alpha(self, t: Tensor) -> Tensor:
        return self._stretched(torch.exp(-self._noise(t)) - math.exp(-self.most))

    def slope(self, t: Tensor) -> Tensor:
        noise = self._noise(t)
        return -self._stretched(math.log(self.most / self.least) * noise * torch.exp(-noise))


SCHEDULES = {
    "linear": Polynomial(),
    "quadratic": Polynomial(2.0),
    "cosine": Cosine(),
    "geometric": Geometric(),
}

# -- forward and reverse process -------------------------------------------------------------------


def transition_matrix(alpha_s: float, alpha_t: float, m: int) -> Tensor:
    """Q(s, t) = (alpha_t / alpha_s) I + (1 - alpha_t / alpha_s) 1 e_m^T for s <= t, (m+1, m+1).

    Row j is the distribution of x_t given x_s = j; [MASK] is the last state, m. Neighbouring times
    give the one-step Q_i, alpha_s = 1 the marginal of the first i steps.
    """
    kept = alpha_t / alpha_s
    matrix = kept * torch.eye(m + 1, dtype=torch.float64)
    matrix[:, m] += 1 - kept
    return matrix


def posterior(xt: Tensor, mu: Tensor, alpha_s: float, alpha_t: float, mask_token_id: int) -> Tensor:
    """q(x_s | x_t, x_0 = mu) for s < t, each position apart (Shi et al. 2024, section 2).

    A one-hot `mu` gives the posterior of the forward process, the model's mu_theta the reverse
    process p_theta(x_s | x_t). Unmasked tokens are carried over.

    `xt` are token ids (...), `mu` probabilities of x_0, (..., V), none of it on [MASK]; so are what
    is returned of x_s.
    """
    revealed = (alpha_s - alpha_t) / (1 - alpha_t)
    stay = F.one_hot(xt, mu.shape[-1]).to(mu.dtype)
    masked = (xt == mask_token_id)[..., None]
    return torch.where(masked, revealed * mu + (1 - revealed) * stay, stay)


# -- losses ----------------------------------------------------------------------------------------

NODES = 200  # of quadrature: c is a polynomial of degree L, and every schedule is smooth
# c of the header: probabilities of being unmasked, (K,), to expected nats, (..., K).
MaskedNLL = Callable[[Tensor], Tensor]


def discrete_terms(masked_nll: MaskedNLL, schedule: Schedule, steps: int) -> Tensor:
    """The terms of minus the ELBO of `steps` steps, (..., T), in float64.

    The first is the reconstruction term E[-log p_theta(x_0 | x_{t(1)})], the others are the KL
    divergences that sum to L_T; the prior's term is 0, since alpha(1) = 0. The reconstruction term
    *is* the KL divergence of i = 1: a sum from there counts it twice. Averaged over the data, the
    total falls to `limit_loss` as `steps` doubles if the model's conditionals are those of the
    data; for other models it need not.
    """
    alpha = schedule.alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    alpha_s, alpha_t = alpha[:-1], alpha[1:]
    return (alpha_s - alpha_t) / (1 - alpha_t) * masked_nll(alpha_t)


def limit_loss(masked_nll: MaskedNLL, schedule: Schedule) -> Tensor:
    """L_inf, the limit of many steps, by Gauss-Legendre quadrature over t, (...), in float64."""
    x, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(NODES))
    t = (x + 1) / 2
    return (schedule.weight(t) * masked_nll(schedule.alpha(t))) @ (w / 2)


def log_snr_loss(masked_nll: MaskedNLL) -> Tensor:
    """L_inf as an integral over the log-SNR, by the trapezium rule, (...), in float64.

    The integrand falls like exp(-|lambda|) on both sides: beyond 36 it is lost in float64.
    """
    log_snr = torch.linspace(-36, 36, 5 * NODES, dtype=torch.float64)
    alpha = log_snr.sigmoid()
    return torch.trapezoid(alpha * masked_nll(alpha), log_snr)


# -- Monte-Carlo estimates, as in training ---------------------------------------------------------


def sample_times(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` times t in (0, 1] with weights w such that the mean of w f(t) estimates the integral
    of f(t) / t over (0, 1], without bias.

    t = u^2 with one uniform u in each of `count` equal strata, shuffled: the density 1/(2 sqrt t)
    minimises the variance that the weight 1/t puts on a sum over about t L masked tokens, and the
    strata remove most of what is left (Kingma et al. 2021, section 5).
    """
    offset = torch.rand(count, generator=generator, device=generator.device)
    strata = torch.randperm(count, generator=generator, device=generator.device)
    u = (strata + 1 - offset) / count
    return u.square(), 2 / u


def mask_tokens(
    x0: Tensor, t: Tensor, maskable: Tensor, mask_token_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw x_t ~ q(x_t | x_0), (B, L); returns it and which positions are masked, (B, L) bool.

    Args:
        t: times in (0, 1] of the linear schedule, one a row (B,) or a position (B, L); of another
            schedule, 1 - alpha_t.
        maskable: positions the process acts on, (B, L) bool; the others stay clean.
    """
    u = torch.rand(x0.shape, generator=generator, device=generator.device)
    masked = (u < t.view(len(t), -1)) & maskable
    return torch.where(masked, mask_token_id, x0), masked


def linear_elbo_loss(token_nll: Tensor, masked: Tensor, weight: Tensor, maskable: Tensor) -> Tensor:
    """Monte-Carlo estimate of L_inf under alpha_t = 1 - t, in nats per token, from -log
    p_theta(x_0^i | x_t) at the `masked` positions (B, L) in row-major order, (N,), and the weights
    of `sample_times`, one a row (B,) or a position (B, L)."""
    weights = weight.view(len(weight), -1).expand(masked.shape)[masked]
    return (weights * token_nll).sum() / maskable.sum()
