"""The block-level decision process: what a policy makes of the states its sampler went through.

An episode is one completion of L positions, in blocks of K that are revealed from left to right in
T steps; block and number of positions of a step are the same for every episode.

    state   s_t: the prompt, the clean blocks before the active one, and the active block as far as
            it is revealed; later blocks are all [MASK] (bidirectional) or unseen (block-causal)
    action  a_t: the tokens x_i written at the positions i of U_t; the next state is then certain
    policy  log pi(a_t | s_t) = sum over i in U_t of log p_i(x_i | s_t)

The sampler is that of `remasking="state_confidence"`: U_t are the positions surest in s_t, chosen
before a token is drawn and without a probability of their own. (With an `order_temperature` they
would have one, which `trajectory-positions` knows; episodes do without.) The sum over steps is thus
the exact log-probability with which the sampler writes the completion, and every position counts,
those behind the end token too. (A position that no step reveals is [MASK] in every state.)

A recorded `Rollout` holds all of it in `completion_ids` and `revealed_at`. One forward pass looks
at many states at once:

    bidirectional   one canvas a state, P + L columns, stacked
    block-causal    one row an episode: prompt and clean blocks once, and behind them the active
                    block of every state, which sees itself and the clean blocks before it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import MaskedDiffusionPolicy
from mdmrl.policies.patterns import hidden_beside
from mdmrl.rl.rollout import Rollout
from mdmrl.sampling.denoise import denoise
from mdmrl.sampling.output import SamplerOutput
from mdmrl.sampling.states import features, mean_embedding

# Not -inf, which would make the KL's 0 * (inf - inf) no number.
NEVER = -1e9


@dataclass
class StateScores:
    """What the network says about S states of R episodes.

    block: hidden states that predict the active block, (R, S, K, H). context: the mean of those of
    the prompt and the clean blocks, (R, S, H). written: see `mean_embedding`, (R, S, H). masked,
    revealed: positions of the active block that the state has masked, and those that the step
    reveals, (R, S, K) bool. tokens, logprobs: what the sampler drew there and how probable it was,
    (R, S, K). start: first position of the active block, (S,).
    """

    block: Tensor
    context: Tensor
    written: Tensor
    masked: Tensor
    revealed: Tensor
    tokens: Tensor
    logprobs: Tensor
    start: Tensor

    def features(self, length: int) -> Tensor:
        """What a value function sees of each state of a completion of `length`, (R, S, 3H+2)."""
        seen = (self.block, self.context, self.written, self.masked)
        return features(*seen, self.start, length)

    def drawn(self, logp: Tensor) -> Tensor:
        """Of log-probabilities (N, V) at the revealed positions those of the tokens there, (N,)."""
        return logp.gather(1, self.tokens[self.revealed][:, None])[:, 0]

    @torch.no_grad()
    def selection_changed(self, policy: MaskedDiffusionPolicy, logp: Tensor) -> Tensor:
        """Where the policy would now reveal other positions than the step did, (R, S) bool; `logp`
        are its log-probabilities at the revealed positions, (N, V)."""
        rest = self.masked & ~self.revealed
        surest = torch.cat(
            policy.of_logits(lambda x: _log_softmax(policy, x).amax(-1), self.block[rest])
        )
        others = logp.new_full(rest.shape, -torch.inf).masked_scatter(rest, surest)
        chosen = logp.new_full(rest.shape, torch.inf).masked_scatter(self.revealed, logp.amax(-1))
        return others.amax(-1) > chosen.amin(-1)


@dataclass
class OldPolicyScores:
    """What policy and reference say about the states and actions of a rollout before an update.

    parts: rows and steps of each micro-batch. logp: log-probabilities of its N tokens, (N,) each;
    reference: the reference's hidden states there, (N, H) each. features: of all states, (B, T, F).
    kl: each action's KL(pi || pi_ref), summed over its positions, (B, T). max_logprob_mismatch: the
    largest difference between a log-probability and the sampler's own.
    """

    rollout: Rollout
    parts: list[tuple[slice, slice]]
    logp: list[Tensor]
    reference: list[Tensor]
    features: Tensor
    kl: Tensor
    max_logprob_mismatch: float

    def rewards(self, charge: float) -> Tensor:
        """r_t, (B, T): the completion's reward at the last step, and `charge` for a nat of KL."""
        rewards = torch.zeros_like(self.kl)
        rewards[:, -1] = self.rollout.rewards.nan_to_num(0)
        return rewards - charge * self.kl if charge else rewards


@torch.no_grad()
def score_episodes(
    policy: MaskedDiffusionPolicy, rollout: Rollout, states_per_forward: int, reference=True
) -> OldPolicyScores:
    """Look at every state of a recorded `rollout` with the policy as it is and its reference; or
    without `reference` with the policy alone, whose KL then counts as 0."""
    known, rule = rollout.revealed_at is not None, rollout.sampler.rule
    require(known, "an episode has a trajectory, and this rollout none: its draw has to record one")
    require(
        rule.before_drawing,
        f"remasking={rule.name}: expected a rule that looks at the state alone (state_confidence), "
        "or what it chooses has a probability of its own",
    )
    (batch, length), steps = rollout.completion_ids.shape, len(block_starts(policy, rollout))
    rows = max(1, states_per_forward // steps)  # whole episodes if they fit
    parts = [
        (slice(row, row + rows), slice(step, min(step + states_per_forward, steps)))
        for row in range(0, batch, rows)
        for step in range(0, steps, states_per_forward)
    ]
    logps, references, features, kls, off = [], [], [], [], 0.0
    with policy.together():
        for chosen, now in parts:
            part = rollout.select(chosen)
            states = score_states(policy, part, now)
            at = states.revealed
            logp = log_probabilities(policy, states.block[at])
            drawn = states.drawn(logp)
            kl = torch.zeros(at.shape, device=drawn.device)
            if reference:
                with policy.reference():
                    references.append(score_states(policy, part, now).block[at])
                    ref = log_probabilities(policy, references[-1])
                kl = kl.masked_scatter(at, kl_divergence(logp, ref))
            logps.append(drawn)
            features.append(states.features(length).flatten(0, 1))
            kls.append(kl.sum(-1).flatten())
            off = max(off, (drawn - states.logprobs[at]).abs().max().item())
    seen, kl = torch.cat(features).view(batch, steps, -1), torch.cat(kls).view(batch, steps)
    return OldPolicyScores(rollout, parts, logps, references, seen, kl, off)


def finished_greedily(policy: MaskedDiffusionPolicy, rollout: Rollout) -> SamplerOutput:
    """The texts that the policy makes greedily of what a recorded `rollout` has after half of its
    steps, in as many steps of equal sizes as are left; for what `PPOConfig.half_text` allows."""
    steps, length = len(block_starts(policy, rollout)), rollout.completion_ids.shape[1]
    written = rollout.revealed_at < steps // 2
    ids = rollout.completion_ids.masked_fill(~written, policy.mask_token_id)
    parts = (rollout.prompt_ids, ids), (rollout.prompt_mask, torch.ones_like(written))
    parts += ((torch.zeros_like(rollout.prompt_mask), ~written),)
    canvas = (torch.cat(pair, 1) for pair in parts)
    whole = rollout.block_length(policy) == length
    left = steps - steps // 2 if whole else steps  # finished blocks take none
    greedy = rollout.sampler.replace(temperature=0.0, steps=left, step_sizes="equal")
    return denoise(policy, *canvas, rollout.prompt_ids.shape[1], greedy, None)


def block_starts(policy: MaskedDiffusionPolicy, rollout: Rollout) -> Tensor:
    """First completion position of the block that each step reveals, (T,)."""
    revealed_at = rollout.revealed_at[0]
    starts = torch.zeros(int(revealed_at.max()) + 1, dtype=torch.long, device=revealed_at.device)
    positions = (revealed_at >= 0).nonzero()[:, 0]
    starts[revealed_at[positions]] = positions - positions % _block_length(policy, rollout)
    return starts


def _block_length(policy: MaskedDiffusionPolicy, rollout: Rollout) -> int:
    """Positions of a block, which are all revealed."""
    own = rollout.sampler.block_length or policy.block_length
    return own or int((rollout.revealed_at[0] >= 0).sum())


def score_states(policy: MaskedDiffusionPolicy, rollout: Rollout, steps: slice) -> StateScores:
    """What the policy says of some `steps` of every episode of `rollout`, in one forward pass."""
    start = block_starts(policy, rollout)
    now = torch.arange(len(start), device=start.device)[steps]  # (S,)
    start = start[steps]
    inside = torch.arange(_block_length(policy, rollout), device=start.device)
    columns = start[:, None] + inside  # (S, K)
    when_all = rollout.revealed_at[:, None]  # (R, 1, L)
    when, tokens = rollout.revealed_at[:, columns], rollout.completion_ids[:, columns]
    masked = when >= now[:, None]
    if policy.block_length is not None:
        xt = tokens.masked_fill(masked, policy.mask_token_id)  # (R, S, K)
        block, context = _packed(policy, rollout, xt, start)
    else:
        ids = rollout.completion_ids[:, None]
        xt = torch.where(when_all >= now[:, None], policy.mask_token_id, ids)  # (R, S, L)
        hidden, context = _stacked(policy, rollout, xt, start)
        first = rollout.prompt_ids.shape[1] - int(policy.logit_shift)
        block = hidden[:, torch.arange(len(start))[:, None], first + columns]
    revealed = (when_all >= 0) & (when_all < now[:, None])  # (R, S, L)
    written = mean_embedding(policy, rollout.completion_ids, revealed)
    logprobs = rollout.logprobs[:, columns]
    return StateScores(
        block, context, written, masked, when == now[:, None], tokens, logprobs, start
    )


def _stacked(policy, rollout: Rollout, xt: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (R, S, P+L, H) of the canvases `xt` (R, S, L), and their context's mean."""
    shape, seen = (*xt.shape[:2], -1), rollout.seen
    if seen is None:
        seen = torch.ones_like(xt[:, 0], dtype=torch.bool)
    real = torch.cat([rollout.prompt_mask, seen], 1)
    prompt, attention = (x[:, None].expand(shape) for x in (rollout.prompt_ids, real))
    canvas = torch.cat([prompt, xt], -1)
    hidden = policy.hidden_states(canvas.flatten(0, 1), attention.flatten(0, 1))
    hidden = hidden.unflatten(0, xt.shape[:2])
    context = attention & _before(start, prompt.shape[-1], canvas.shape[-1])
    return hidden, _mean(hidden, context[:, :, None])[:, :, 0]


def _packed(policy, rollout: Rollout, xt: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (R, S, K, H) of the active blocks `xt` (R, S, K), and their context's mean."""
    width, length = rollout.prompt_ids.shape[1], int(start[-1])
    states, size = xt.shape[1:]
    clean = torch.cat([rollout.prompt_ids, rollout.completion_ids[:, :length]], 1)
    real = torch.cat([rollout.prompt_mask, torch.ones_like(clean[:, width:], dtype=torch.bool)], 1)
    inside = torch.arange(size, device=xt.device)
    pattern, columns = policy.pattern(width, length + size), width + start[:, None] + inside
    copy = torch.arange(1, states + 1, device=xt.device).repeat_interleave(size)
    beside = xt.flatten(1), columns.flatten(), copy
    text, blocks = hidden_beside(policy, clean, real, pattern, *beside)
    context = real[:, None] & _before(start, width, clean.shape[1])
    return blocks.unflatten(1, (states, size)), _mean(text, context)


def _before(start: Tensor, width: int, columns: int) -> Tensor:
    """Which columns of a canvas come before each state's active block, (S, columns) bool."""
    return torch.arange(columns, device=start.device) < width + start[:, None]


def _mean(hidden: Tensor, where: Tensor) -> Tensor:
    """Mean of `hidden` (..., W, H) over each row of `where` (..., M, W), detached: (..., M, H)."""
    return where.to(hidden.dtype) @ hidden.detach() / where.sum(-1, keepdim=True)


def log_probabilities(policy: MaskedDiffusionPolicy, hidden: Tensor) -> Tensor:
    """Log-probabilities (N, V) that the sampler draws from, which never draws [MASK]; float32."""
    return _log_softmax(policy, policy.head(hidden))


def _log_softmax(policy: MaskedDiffusionPolicy, logits: Tensor) -> Tensor:
    mask = torch.tensor([policy.mask_token_id], device=logits.device)
    return logits.index_fill(-1, mask, NEVER).log_softmax(-1)


def kl_divergence(logp: Tensor, ref: Tensor) -> Tensor:
    """KL(pi || pi_ref) over the whole vocabulary from log-probabilities (N, V); (N,)."""
    return (logp.exp() * (logp - ref)).sum(-1)
