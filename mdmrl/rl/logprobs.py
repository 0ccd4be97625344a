"""Estimators of log pi(o | q) behind one switch: `estimator(name, policy)(policy, rollout, noise)`.

Values are in nats, float32: one a token, (B, L), zero outside the completion mask, or one a text,
(B,). Several different things are called log p for a masked diffusion model; `ESTIMATORS` says
which of them each one estimates, how far off and in how many forward passes. The formulas and
their sources are in `mdmrl.rl.estimators`, exact values for short texts in `mdmrl.rl.oracle`.

    any-order log p    log E prod_k p(x_k | those before x_k), over orders: the law of the sampler
                       that reveals one position a step, each as likely as any other
    ELBO               E sum_k log p(x_k | those before x_k), below it
    trajectory         log of the probability that the sampler's own steps revealed these tokens.
                       Where positions are ranked before tokens are drawn (`state_confidence`, its
                       `order_temperature` 0) every text has one trajectory, and this is log p of
                       that sampler

A name may carry settings, after hyphens (it ends up in file names and notebook parameters, which
can have no ":" or "="): `elbo-4` averages 4 samples; `elbo-4-unshared` draws the reference policy's
noise apart; `trajectory-positions` adds the probability of the positions that were chosen;
`upper_bound-2-b1` takes b = 1, where the bound does not hold. As part of the name they leave the
configurations, and so the hashes, of all other runs as they are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from mdmrl.config import InputError, require, unknown
from mdmrl.policies import Policy
from mdmrl.rl import estimators as formulas
from mdmrl.rl.estimators import Noise, draw_noise
from mdmrl.rl.rollout import Rollout

__all__ = ["ESTIMATORS", "Estimator", "Noise", "draw_noise", "estimator"]


@dataclass(frozen=True)
class Estimator:
    """A way to score completions, to be called with `(policy, rollout, noise)`.

    Attributes:
        function: the formula.
        target: what the values of a text, summed over tokens, estimate; bias: how far the
            expectation is from it.
        cost: forward passes of a call, by the number of samples k, the length L and the denoising
            steps S (for block diffusion, those of one block); those of a trajectory are packed,
            `STATES_AT_ONCE` in one.
        samples: k, where it draws any; noise has as many.
        shared: the reference policy is scored with the same noise (Zhu et al. 2025, LLaDA 1.5).
        records: it needs the rollout's trajectory, all of which counts.
        reads_on: it sees what stands behind the end of a text, so the sampler must write it.
        denoising: it is for policies that denoise; False for autoregressive ones.
    """

    function: Callable[[Policy, Rollout, Noise], Tensor]
    target: str = ""
    bias: str = ""
    cost: str = ""
    samples: int = 0
    shared: bool = True
    records: bool = False
    reads_on: bool = False
    denoising: bool = True

    def __call__(self, policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
        """(B, L) or (B,); an InputError for anything else."""
        found, shape = self.function(policy, rollout, noise), tuple(rollout.completion_ids.shape)
        said = tuple(found.shape) if isinstance(found, Tensor) else f"{found!r:.80}"
        name = getattr(self.function, "__name__", "of your own")
        wanted = f"expected a tensor, {shape} or {shape[:1]}"
        require(said in (shape, shape[:1]), f"logp_estimator {name} gives {said}: {wanted}")
        return found


ESTIMATORS = {
    "exact": Estimator(formulas.clean_text, "log p", "none", cost="1", denoising=False),
    "ar_style": Estimator(
        formulas.clean_text,
        "nothing: every token sees itself",
        "no likelihood to compare with",
        cost="1",
        reads_on=True,
    ),
    "one_step": Estimator(
        formulas.one_step,
        "log p of the one-step sampler, which may draw [MASK]",
        "none; of masked prompts, where p_mask_prompt > 0",
        cost="1",
    ),
    "random_mask": Estimator(
        formulas.random_mask,
        "ELBO; the mean a token, UniGRPO's value, ELBO / L",
        "none",
        cost="k",
        samples=1,
    ),
    "elbo": Estimator(formulas.elbo, "ELBO", "none", cost="k", samples=1),
    "complementary": Estimator(formulas.complementary, "ELBO", "none", cost="2k", samples=1),
    "overlapping": Estimator(formulas.overlapping, "ELBO", "none", cost="2k", samples=1),
    "coupled": Estimator(
        formulas.coupled,
        "one_step / 2 + the ELBO's mean over masked shares t in (0.2, 0.8)",
        "none",
        cost="1 + 2k",
        samples=1,
    ),
    "quadrature": Estimator(
        formulas.quadrature, "ELBO", "that of k nodes in t; none where 2k >= L", cost="k", samples=3
    ),
    "ar_order": Estimator(
        formulas.ar_order, "log p of the left-to-right sampler", "none", cost="L"
    ),
    "trajectory": Estimator(
        formulas.trajectory,
        "log p of the tokens that the recorded steps revealed",
        "none; log p of the text where the state alone ranks positions",
        cost="S",
        records=True,
    ),
    "upper_bound": Estimator(
        formulas.upper_bound,
        "Hölder's bound above the any-order log p, which needs b >= L",
        "downwards, of order 1/k",
        cost="2k",
        samples=1,
    ),
}


def estimator(named: str | Callable | Estimator | None, policy: Policy) -> Estimator:
    """How to score the completions of `policy`.

    Args:
        named: a name of ours, with the settings that it carries (`ar_style` of an autoregressive
            policy is `exact`); None for the family's own; or an estimator of one's own, a function
            f(policy, rollout, noise) -> (B, L) or (B,), with noise of one sample, or an `Estimator`
            that says more of it.

    Raises:
        InputError: an unknown name or setting, or a policy of a family it says nothing about.
    """
    named = policy.logp_estimator if named is None else named
    if callable(named):
        return named if isinstance(named, Estimator) else Estimator(named, samples=1)
    plain, *settings = named.split("-")
    if plain == "ar_style" and not policy.denoises:
        plain = "exact"
    if plain not in ESTIMATORS:
        raise unknown("logp_estimator", named, ESTIMATORS)
    found = ESTIMATORS[plain]
    fitting = [repr(n) for n, other in ESTIMATORS.items() if other.denoising == policy.denoises]
    require(
        found.denoising == policy.denoises,
        f"logp_estimator={named!r} is not for policies of kind {policy.kind!r}: expected "
        f"{' or '.join(fitting)}",
    )
    for setting in settings:
        found = _with(found, plain, setting)
    return found


def _with(found: Estimator, plain: str, setting: str) -> Estimator:
    power = re.fullmatch(r"b(\d+(?:\.\d+)?)", setting)
    if found.samples and setting.isdecimal() and int(setting) > 0:
        return replace(found, samples=int(setting))
    if found.samples and setting == "unshared":
        return replace(found, shared=False)
    if plain == "trajectory" and setting == "positions":
        return replace(found, function=partial(found.function, positions=True))
    if plain == "upper_bound" and power and float(power[1]) > 0:
        return replace(found, function=partial(found.function, b=float(power[1])))
    known = {"trajectory": ["'positions'"], "upper_bound": ["a power ('b1')"]}.get(plain, [])
    known += ["a number of samples ('4')", "'unshared'"] if found.samples else []
    raise InputError(
        f"logp_estimator {plain!r} has no setting {setting!r}: "
        f"expected {' or '.join(known) if known else 'none'}"
    )
