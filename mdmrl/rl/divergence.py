"""How far a policy has moved from where it started: the exact KL of a sampler's paths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import MaskedDiffusionPolicy, Prompt
from mdmrl.rl.episodes import block_starts, kl_divergence, log_probabilities, score_states
from mdmrl.rl.rollout import Rollout
from mdmrl.sampling import SamplerConfig, generate


@torch.no_grad()
def path_kl(
    policy: MaskedDiffusionPolicy,
    start: MaskedDiffusionPolicy,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """KL(pi || pi_start) of the paths on which `policy` completes `prompts`, in nats, (B,).

    One path a prompt is drawn. At each of its steps the KL of what is written at the revealed
    positions is exact, over the whole vocabulary; the sum is thus an unbiased estimate of the KL
    of paths, positions being those that `policy` chooses (`mdmrl.rl.episodes`). The sampler of
    `config` must choose them by the state alone, go on behind the end, and draw untempered.
    """
    require(
        config.rule.before_drawing
        and not (config.order_temperature or config.stop_at_end or config.parallel),
        f"{config.described() or 'the default sampler'}: expected a remasking that looks at the "
        "state alone (state_confidence), stop_at_end=False and a given number of positions a step",
    )
    require(
        config.temperature == 1 and config.untempered and config.suppress_mask,
        f"{config.described()}: expected temperature=1, no top_k, no top_p, no [MASK]",
    )
    output = generate(policy, prompts, config, generator, record=True)
    total = torch.zeros(len(prompts), device=policy.device)
    rollout = Rollout.of(output, total, total == 0, config)
    for step in range(len(block_starts(policy, rollout))):
        now = slice(step, step + 1)
        states, before = (score_states(p, rollout, now) for p in (policy, start))
        at = states.revealed
        logp = log_probabilities(policy, states.block[at])
        kl = kl_divergence(logp, log_probabilities(start, before.block[at]))
        total = total + torch.zeros_like(at, dtype=kl.dtype).masked_scatter(at, kl).sum((1, 2))
    return total
