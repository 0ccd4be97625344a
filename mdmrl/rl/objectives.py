"""The objectives of `GRPOConfig.loss_type`: what each token gains, and how gains are averaged.

With A_i the advantage of completion o_i in its group of G, l_ik = log pi(o_ik), rho_ik its ratio to
the old policy and d_ik = l_ik - log pi_ref(o_ik), the policy maximises an average over tokens of

    gain_ik - beta KL(d_ik)

               gain                                 average
    grpo       min(rho_ik A_i, clip(rho_ik) A_i)    over tokens of o_i, then over completions
    dr_grpo    the same                             sum over tokens / L, over completions
    dapo       the same                             over all tokens of all completions
    wd1        W_i l_ik                             that of dr_grpo
    spg        A_i l_ik                             that of dapo

L is the constant `max_completion_length`, clip is to [1 - eps, 1 + eps], above to
1 + `epsilon_high` if that is given (`clip` has two variants of this gain), and

    rho_ik = exp(l_ik - l_ik^old), or with importance_sampling_level="sequence" the same for all k,
             exp((log pi(o_i) - log pi_old(o_i)) / |o_i|)                  (Zheng et al. 2025, GSPO)
    W_i    = G [softmax(psi A)_i - softmax(-psi A)_i], softmax over the group
    spg    scores log pi(o_i) by an ELBO B_i where A_i >= 0, by w U_i + (1 - w) B_i where A_i < 0,
           U_i being an upper bound and w `mix_weight`.

`kl_estimator="k3_ratio"` is rho_ik k3(d_ik), its gradient through both factors: weighed so, samples
of the old policy stand for those of the new one.

With `kl_in_reward` the KL is taken off the reward instead, beta sum_k KL(d_ik). There k1 is right:
the expected gradient is that of KL(pi || pi_ref), while of k2 and k3 a reward does not see how they
themselves change with the policy.

Where an estimator gives log pi(o_i) as a whole, every token of o_i has l_ik = log pi(o_i) / |o_i|,
so that both levels give the ratio of the sequence (Ou et al. 2025, ESPO).

Sources: grpo, Shao et al. 2024; dr_grpo, Liu et al. 2025; dapo, Yu et al. 2025; wd1, Tang et al.
2025; spg, Wang et al. 2025. Deviations from them:
 * Advantages are divided by the group's standard deviation unless `scale_rewards` says otherwise;
   dr_grpo and wd1 are published with scale_rewards="none".
 * dapo is its average alone. TRL's `bnpo` averages over a micro-batch, and so depends on how large
   that is: left out.
 * wd1 has no L and no G, constants that Adam does not see. Samples that a reward left out have no
   part in the softmax.
 * wd1 and spg are published without a KL: set beta=0.
 * spg: B_i is `logp_estimator`, U_i `upper_bound` of the same noise, without SPG's constant and
   with b = |o_i| where `eubo_beta` does not say otherwise: with less it is no bound. No masking in
   blocks but for block diffusion. A KL in the loss is of the same values, one in the reward of B_i.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.rl.config import RATIO_FREE, GRPOConfig, PPOConfig
from mdmrl.rl.estimators import Noise, upper_bound
from mdmrl.rl.kl import WITH_RATIO, kl_form
from mdmrl.rl.logprobs import Estimator
from mdmrl.rl.rollout import Rollout
from mdmrl.training.loop import mean_count


def grpo_loss(
    logp: Tensor, old: Tensor, ref: Tensor | None, rollout: Rollout, config: GRPOConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The two parts of the loss, summed over completions, and per-token quantities for the log.

    Args:
        logp, old, ref: log-probabilities under the new, old and reference policy, of tokens (B, L)
            or of completions (B,); without `ref` there is no KL.
        rollout: with W in the place of the advantages for `wd1`.
    Returns:
        surrogate and beta * KL, scalars to be divided by `divisor` of the whole batch; `d` and `kl`
        where there is a reference, `ratio` and `clipped` where there is a ratio, (B, L) or (B, 1).
    """
    mask, advantage = rollout.completion_mask, rollout.advantages[:, None]
    length = mask.sum(1)
    logp, old = of_tokens(logp, mask), of_tokens(old, mask)
    if config.loss_type in RATIO_FREE:
        gain, tokens = advantage * logp, {}
    else:
        change = logp - old
        if config.importance_sampling_level == "sequence":
            change = over_tokens(change, mask)[:, None]
        ratio = change.exp()
        gain, clipped = clipped_gain(ratio, advantage, logp, config)
        tokens = {"ratio": ratio, "clipped": clipped}

    def over_completions(x: Tensor) -> Tensor:
        means = over_tokens(x, mask)
        return ((means if config.loss_type == "grpo" else means * length) * rollout.learnt).sum()

    charged = torch.zeros(())
    if ref is not None:
        d = logp - of_tokens(ref, mask)
        kl = kl_form(config.kl_estimator)(d)
        if config.kl_estimator == WITH_RATIO:
            kl = ratio * kl
        tokens |= {"d": d, "kl": kl}
        # An infinite KL must not reach a loss that does without it: 0 * inf is nan.
        if config.beta and not config.kl_in_reward:
            charged = config.beta * over_completions(kl)
    seen = {name: value.detach() for name, value in tokens.items()}
    return -over_completions(gain), charged, seen


def divisor(rollout: Rollout, config: GRPOConfig) -> float:
    """What the sums of `grpo_loss` over a batch are divided by to be an average over that of all
    processes."""
    by_token = config.loss_type in ("dapo", "spg")
    counted = rollout.completion_mask[rollout.learnt] if by_token else rollout.counted
    constant = config.loss_type in ("dr_grpo", "wd1")
    return mean_count(int(counted.sum())) * (config.max_completion_length if constant else 1)


def of_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of tokens (B, L) as they are, of completions (B,) their means, (B, 1)."""
    return x if x.ndim == 2 else (x / mask.sum(1))[:, None]


def over_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Means over the tokens of each completion, (B,), of values (B, L), or (B, 1) for all alike."""
    return x[:, 0] if x.shape[1] == 1 else (x * mask).sum(1) / mask.sum(1)


def clipped_gain(
    ratio: Tensor, advantages: Tensor, logp: Tensor, config: GRPOConfig | PPOConfig
) -> tuple[Tensor, Tensor]:
    """The gain of tokens by `config.clip`, and which of them were clipped."""
    inside = ratio.clamp(1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon))
    match config.clip:
        case "one_sided":
            gain = torch.minimum(ratio * advantages, inside * advantages)
            return gain, gain < ratio * advantages
        case "two_sided":
            return inside * advantages, inside != ratio
        case "cispo":
            return inside.detach() * advantages * logp, inside != ratio


def charge(logp: Tensor, ref: Tensor, rollout: Rollout, config: GRPOConfig) -> Tensor:
    """beta sum_k KL(d_ik), (B,), for `kl_in_reward`. Takes what `grpo_loss` takes."""
    mask = rollout.completion_mask
    d = of_tokens(logp, mask) - of_tokens(ref, mask)
    return config.beta * mask.sum(1) * over_tokens(kl_form(config.kl_estimator)(d), mask)


def wd1_weights(rollout: Rollout, config: GRPOConfig) -> Tensor:
    """W_i of every completion, (B,): within a group they sum to 0."""
    counted = rollout.counted.view(-1, config.num_generations)
    scores = config.psi * rollout.advantages.view_as(counted)
    up, down = (s.masked_fill(~counted, -torch.inf).softmax(1) for s in (scores, -scores))
    weights = torch.where(counted, up - down, 0.0)  # a group of which nothing counts gave nan
    return (weights * counted.sum(1, keepdim=True)).flatten()


def sandwiched(lower: Estimator, config: GRPOConfig) -> Estimator:
    """The estimator of `spg`: `lower`, which must estimate the ELBO, with a share of an upper bound
    where A_i < 0."""
    require(
        lower.target.startswith("ELBO"),
        f"logp_estimator={config.logp_estimator!r}: loss_type='spg' takes a lower bound where "
        "advantages are positive, expected an estimator of the ELBO, such as 'complementary'",
    )

    def bound(policy: Policy, rollout: Rollout, noise: Noise) -> Tensor:
        values, worse = lower(policy, rollout, noise), rollout.advantages < 0
        if config.mix_weight == 0 or not worse.any():
            return values
        upper = upper_bound(policy, rollout.select(worse), noise.select(worse), config.eubo_beta)
        mixed = config.mix_weight * upper + (1 - config.mix_weight) * values[worse]
        return values.masked_scatter(worse, mixed)

    return replace(lower, function=bound)
