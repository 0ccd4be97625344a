"""Estimators of KL(pi || pi_ref) per token from d = log pi - log pi_ref at sampled tokens.

k1, k2 and k3 are unbiased (k2 to second order) where the samples come from pi and d is its own
log-ratio (Schulman 2020). Their gradients as losses differ: k1's vanishes in expectation, k2's is
that of KL(pi || pi_ref), k3's that of KL(pi_ref || pi) (Tang & Munos 2025). Only k3 is exponential
in -d.

`k3_ratio` is k3 times rho, the probability ratio of new to old policy (Liu et al. 2025, DeepSeek
V3.2; the default of TRL since 1.16). The samples are then weighed as those of pi: in expectation
its gradient, too, is that of KL(pi || pi_ref), at every inner iteration.
"""

from collections.abc import Callable

from torch import Tensor

from mdmrl.config import require


def k3(d: Tensor) -> Tensor:
    return (-d).exp() + d - 1


WITH_RATIO = "k3_ratio"
KL_ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": k3,
    WITH_RATIO: k3,  # `grpo_loss`, which knows the ratio, multiplies
}


def kl_form(named: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The form of that name, or a function of d of one's own, (B, L) to (B, L); an InputError
    where that gives anything else."""
    if not callable(named):
        return KL_ESTIMATORS[named]

    def own(d: Tensor) -> Tensor:
        found, wanted = named(d), tuple(d.shape)
        said = getattr(found, "shape", f"{found!r:.80}")
        require(said == wanted, f"kl_estimator={named} gives {said}: expected a tensor, {wanted}")
        return found

    return own
