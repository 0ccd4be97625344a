"""Block-level PPO against plain loops over single states, scalar re-implementations and
enumeration, and what a run must survive."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import Cut, Interrupted, nested, parity
from scipy import stats
from test_sampling import ender

import mdmrl.rl.ppo as ppo
from mdmrl.config import InputError
from mdmrl.policies import add_lora
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import (
    finished_greedily,
    kl_divergence,
    log_probabilities,
    score_episodes,
    score_states,
)
from mdmrl.rl.ppo import check_first_inner_step, ppo_loss, train_ppo, update
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.rl.values import (
    ValueData,
    ValueHead,
    base_states,
    explained_variance,
    fit,
    fit_to_base,
    gae,
    in_halves,
    normalised,
    prompts_of,
    shaped,
    value_loss,
)
from mdmrl.runs import derived_seed, generator_for
from mdmrl.sampling import generate
from mdmrl.training.data import rows_of_step

ROWS = [{"prompt": f"A patient has {x}. Which test is decisive?"} for x in ("fever", "a rash", "x")]
FAMILIES = ("mdm", "shifted", "bd")


def settings(folder="unused", **changes):
    small = {
        "output_dir": str(folder),
        "max_steps": 3,
        "max_completion_length": 8,
        "steps": 5,
        "block_length": 4,
        "states_per_forward": 30,
        "learning_rate": 1e-3,
        "max_grad_norm": 1e6,
        "value_batches": 2,
        "beta": 1.0,
        "log_gradients": True,
    }
    return PPOConfig(**nested(small | changes))


@pytest.fixture(params=FAMILIES)
def denoiser(request, shared_policies):
    """Masked diffusion, the same with shifted logits, block diffusion; often ends early."""
    base = shared_policies["bd" if request.param == "bd" else "mdm"]
    policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
    policy.logit_shift = request.param == "shifted"
    return ender(policy, 4)


def a_rollout(policy, reward=parity, seed=0, rows=ROWS[:2], **changes):
    """Two groups of six with prompts of different lengths: 5 steps, 3 in the first block of 4."""
    config = settings(**changes)
    rollout, *_ = collect(
        policy, rows, [reward], 6, config.sampler_for(policy), generator_for(seed, "x"), record=True
    )
    assert not rollout.prompt_mask.all()
    assert not rollout.completion_mask.all()
    return rollout


def scored(policy, rollout, states=30):
    if not policy.uses_lora and policy._reference is None:
        policy.sync_reference()
    return score_episodes(policy, rollout, states)


def moved(policy, size=0.01):
    """The policy, a little away from its reference."""
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(size * torch.randn(weight.shape, generator=generator_for(0, "move")))
    return policy


def single_states(policy, rollout, row, block=4):
    """The states of one episode one after the other, unpadded and unpacked.

    Yields step, positions of the active block, which are masked, hidden states there (K, H), mean
    hidden state of all columns before.
    """
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    ids, when = rollout.completion_ids[row], rollout.revealed_at[row]
    for step in range(int(when.max()) + 1):
        start = int((when == step).nonzero()[0]) // block * block
        canvas = ids.masked_fill(when >= step, policy.mask_token_id)
        if policy.kind == "bd":
            canvas = canvas[: start + block]
        whole, first = torch.cat([prompt, canvas])[None], len(prompt) + start
        pattern = policy.pattern(len(prompt), len(canvas))
        hidden = policy.forward(whole, pattern=pattern)[0]
        unshifted = policy.hidden_states(whole)[0] if policy.kind == "mdm" else hidden
        inside = torch.arange(start, start + block)
        yield (
            step,
            inside,
            when[inside] >= step,
            hidden[first : first + block],
            unshifted[:first].mean(0),
        )


def single_logp(policy, hidden):
    logits = policy.head(hidden).clone()
    logits[:, policy.mask_token_id] = -torch.inf
    return logits.log_softmax(-1)


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# -- advantages ------------------------------------------------------------------------------------


def random_values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(5, 7, generator=generator).double() for _ in range(2))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_equal_a_scalar_recursion(gamma, lam):
    rewards, values = random_values()
    found = gae(rewards, values, gamma, lam)
    for b in range(5):
        v = [*values[b].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(7)]
        for t in range(7):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(7 - t))
            assert found[b, t].item() == pytest.approx(expected)


def test_advantages_in_closed_form():
    rewards, values = random_values(1)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, 1.0, 1.0), to_go - values)
    following = torch.cat([values[:, 1:], torch.zeros(5, 1)], 1)
    one_step = rewards + 0.9 * following - values
    torch.testing.assert_close(gae(rewards, values, 0.9, 0.0), one_step)
    exact = gae(rewards, to_go, 1.0, 0.3)  # nothing is left to say about the right V
    torch.testing.assert_close(exact, torch.zeros_like(exact))


def exact_values(seed=0):
    """Multiples of 1/64, whose sums are exact in float64."""
    rewards, values = random_values(seed)
    return (rewards * 64).round() / 64, (values * 64).round() / 64


def test_rewards_shaped_by_a_potential_sum_to_as_much_less_that_of_the_start():
    rewards, potentials = exact_values()
    found = shaped(rewards, potentials, 1.0)
    assert torch.equal(found.sum(1), rewards.sum(1) - potentials[:, 0])
    assert torch.equal(gae(rewards, potentials, 1.0, 0.0), found)
    # Any weights of the steps: only potentials that differ from one state to the next count.
    assert torch.equal(shaped(rewards, potentials + 1, 1.0)[:, :-1], found[:, :-1])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_advantages_in_halves_are_those_of_two_episodes(gamma, lam):
    (rewards, values), halfway = exact_values(3), torch.arange(5).double() / 4
    found = in_halves(rewards, values, halfway, gamma, lam)
    for b in range(5):
        paid = rewards[b].tolist()
        paid[2], paid[6] = paid[2] + halfway[b].item(), paid[6] - halfway[b].item()
        for t in range(7):
            end = 3 if t < 3 else 7
            v = [*values[b, :3].tolist(), 0.0] if t < 3 else [0.0] * 8
            steps = range(t, end)
            delta = [paid[u] + gamma * v[u + 1] - v[u] for u in steps]
            expected = sum((gamma * lam) ** k * x for k, x in enumerate(delta))
            assert found[b, t].item() == pytest.approx(expected)
    if gamma == lam == 1:  # what both halves are rewarded with is the whole reward
        assert torch.equal(found[:, 0] + values[:, 0] + found[:, 3], rewards.sum(1))


def test_advantages_are_normalised_over_the_states_that_count():
    advantages, _ = random_values(2)
    counted = torch.tensor([True, False, True, True, False])
    found, divisor = normalised(advantages, counted, Accelerator(cpu=True))
    kept = advantages[counted]
    assert divisor == pytest.approx(kept.std(unbiased=False).item() + 1e-4)
    torch.testing.assert_close(found, (advantages - kept.mean()) / divisor)
    equal, _ = normalised(torch.full((2, 3), 0.3), torch.ones(2).bool(), Accelerator(cpu=True))
    assert equal.abs().max() < 1e-3
    none, _ = normalised(advantages, torch.zeros(5).bool(), Accelerator(cpu=True))
    assert none.isfinite().all()


# -- the loss --------------------------------------------------------------------------------------


def random_tokens(seed=0, n=40):
    generator = torch.Generator().manual_seed(seed)
    logp, old = (-0.5 * torch.rand(n, generator=generator).double() for _ in range(2))
    kl = torch.rand(n, generator=generator).double()
    advantages = torch.randn(n, generator=generator).double()
    counted = torch.rand(n, generator=generator) < 0.8
    return logp, old, kl, advantages, counted


@pytest.mark.parametrize("clip", ["one_sided", "two_sided", "cispo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_and_its_gradient_equal_a_scalar_loop(clip, beta):
    logp, old, kl, advantages, counted = random_tokens()
    logp.requires_grad_()
    surrogate, charged, seen = ppo_loss(
        logp, old, kl, advantages, counted, beta, settings(clip=clip)
    )
    (slope,) = torch.autograd.grad(surrogate, logp)
    total = charge = 0.0
    for i in range(40):
        a, ratio = advantages[i].item(), math.exp(logp[i].item() - old[i].item())
        inside = min(max(ratio, 0.9), 1.1)
        free = {
            "one_sided": ratio <= 1.1 if a > 0 else ratio >= 0.9,
            "two_sided": 0.9 <= ratio <= 1.1,
            "cispo": 0.9 <= ratio <= 1.1,
        }[clip]
        gain = {
            "one_sided": min(ratio * a, inside * a),
            "two_sided": inside * a,
            "cispo": inside * a * logp[i].item(),
        }[clip]
        # A clipped token is not learnt from, except by CISPO, which bounds its weight.
        expected = inside * a if clip == "cispo" else ratio * a * free
        if counted[i]:
            total -= gain / 8
            charge += beta * kl[i].item() / 8
        assert slope[i].item() == pytest.approx(-expected / 8 * counted[i].item())
        assert seen["clipped"][i].item() == (not free)
        assert seen["ratio"][i].item() == pytest.approx(ratio)
    assert surrogate.item() == pytest.approx(total)
    assert charged.item() == pytest.approx(charge)


def test_without_beta_an_exploding_kl_does_not_reach_the_loss():
    logp, old, kl, advantages, counted = random_tokens()
    _, charged, _ = ppo_loss(logp, old, kl * math.inf, advantages, counted, 0.0, settings())
    assert charged.item() == 0


def test_the_kl_is_that_of_the_whole_vocabulary_and_mask_is_never_drawn(mdm):
    hidden = torch.randn(6, 32, generator=generator_for(0, "x"))
    logp, ref = log_probabilities(mdm, hidden), log_probabilities(mdm, hidden + 0.1)
    p, q = (single_logp(mdm, x).double() for x in (hidden, hidden + 0.1))
    assert (logp.exp()[:, mdm.mask_token_id] == 0).all()
    expected = [
        sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True) if a > -math.inf)
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(kl_divergence(logp, ref), torch.tensor(expected))
    assert (kl_divergence(logp, logp) == 0).all()


def test_the_value_loss_equals_a_scalar_loop():
    values, old = random_values(3)
    returns, _ = random_values(4)
    counted = torch.tensor([True, True, False, True, True])
    found = value_loss(values, old, returns, counted, 0.2).item()
    total = 0.0
    for b, t in itertools.product((0, 1, 3, 4), range(7)):
        v, o, r = (x[b, t].item() for x in (values, old, returns))
        clipped = o + min(max(v - o, -0.2), 0.2)
        total += max((v - r) ** 2, (clipped - r) ** 2)
    assert found == pytest.approx(total / 2 / 28)
    assert value_loss(values, old, returns, torch.zeros(5).bool(), 0.2) == 0


def test_explained_variance_by_hand():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns + 3, returns) == 1
    assert explained_variance(torch.full((4,), 7.0), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(4)))


# -- packed states ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("steps", [slice(0, 5), slice(1, 4), slice(3, 5), slice(0, 1)])
def test_a_packed_look_equals_one_state_at_a_time(denoiser, steps):
    rollout = a_rollout(denoiser)
    seen = score_states(denoiser, rollout, steps)
    features = seen.features(8)
    for row in range(0, 12, 5):
        for step, inside, masked, hidden, context in single_states(denoiser, rollout, row):
            if step not in range(5)[steps]:
                continue
            s = step - steps.start
            close = 1e-5 * hidden.abs().max().item()
            torch.testing.assert_close(seen.block[row, s], hidden, atol=close, rtol=1e-4)
            assert torch.equal(seen.masked[row, s], masked)
            assert torch.equal(seen.revealed[row, s], rollout.revealed_at[row, inside] == step)
            assert torch.equal(seen.tokens[row, s], rollout.completion_ids[row, inside])
            told = rollout.completion_ids[row, rollout.revealed_at[row] < step].tolist()
            embedded = [denoiser.model.get_input_embeddings().weight[token] for token in told]
            written = torch.stack(embedded).mean(0) if told else torch.zeros(32)
            rest = [masked.float().mean()[None], inside[:1] / 8]
            expected = [hidden.mean(0), context, written, *rest]
            torch.testing.assert_close(features[row, s], torch.cat(expected), atol=close, rtol=1e-4)


@pytest.mark.parametrize("states", [1, 4, 30, 1000])
def test_packed_log_probabilities_are_those_the_sampler_recorded(denoiser, states):
    rollout = a_rollout(denoiser)
    old = scored(denoiser, rollout, states)
    assert old.max_logprob_mismatch < 1e-4
    total = sum(logp.sum().item() for logp in old.logp)
    assert total == pytest.approx(rollout.logprobs.sum().item(), rel=1e-5)
    # Every position counts, behind the end of the text too.
    assert sum(map(len, old.logp)) == rollout.completion_ids.numel()
    assert old.features.shape == (12, 5, 98)
    assert (old.kl == 0).all()


def test_episodes_follow_the_sizes_of_steps(denoiser):
    rollout = a_rollout(denoiser, steps=None, step_sizes=[1, 3])
    counts = [torch.bincount(row, minlength=4).tolist() for row in rollout.revealed_at]
    assert counts == [[1, 3, 1, 3]] * 12
    assert scored(denoiser, rollout).max_logprob_mismatch < 1e-4


def test_the_work_is_counted(mdm, bd):
    """A canvas a state, or the clean text once and a block a state."""
    rollout = a_rollout(ender(mdm, 4))
    width = rollout.prompt_ids.shape[1]
    for policy, states, cost in (
        (mdm, 4, 5 * (width + 8)),
        (bd, 1000, width + 4 + 5 * 4),
        (bd, 3, 2 * width + 4 + 5 * 4),
    ):
        before = policy.positions_computed
        scored(policy, rollout, states)
        assert policy.positions_computed - before == 2 * 12 * cost  # policy and reference


@torch.no_grad()
def test_what_is_selected_is_compared_with_what_would_be(denoiser):
    rollout = a_rollout(denoiser)

    def changed():
        seen = score_states(denoiser, rollout, slice(0, 5))
        logp = log_probabilities(denoiser, seen.block[seen.revealed])
        return seen.selection_changed(denoiser, logp)

    assert not changed().any()
    moved(denoiser, 0.1)
    found = changed()
    assert 0 < found.float().mean() < 1
    for row in (0, 7):
        for step, inside, masked, hidden, _ in single_states(denoiser, rollout, row):
            surest = single_logp(denoiser, hidden).amax(-1).masked_fill(~masked, -torch.inf)
            revealed = rollout.revealed_at[row, inside] == step
            best = set(surest.topk(int(revealed.sum())).indices.tolist())
            assert found[row, step].item() == (best != set(revealed.nonzero()[:, 0].tolist()))


# -- enumeration -----------------------------------------------------------------------------------


def every_completion(policy, tokens, length, block):
    """The sampler's path to every completion over `tokens`, one token a step, for the prompt x."""
    head = policy.head

    def few(hidden):
        logits = head(hidden)
        kept = torch.zeros(logits.shape[-1], dtype=torch.bool)
        kept[tokens] = True
        return logits.masked_fill(~kept, -1e9)

    policy.head = few
    if policy.kind == "bd":
        policy.model.config.block_length = block
    encoded = policy.encode(["x"])
    ids = torch.tensor(list(itertools.product(tokens, repeat=length)))
    n = len(ids)
    when, logprobs = torch.full_like(ids, length), torch.zeros(ids.shape)
    for i, x in enumerate(ids):
        for step in range(length):
            start = step // block * block
            canvas = x.masked_fill(when[i] == length, policy.mask_token_id)
            canvas = canvas[: start + block] if policy.kind == "bd" else canvas
            whole = torch.cat([encoded.input_ids[0], canvas])[None]
            pattern = policy.pattern(encoded.input_ids.shape[1], len(canvas))
            with torch.no_grad():
                logp = policy.logits(whole, pattern=pattern)[0, -len(canvas) :].log_softmax(-1)
            todo = [j for j in range(start, start + block) if when[i, j] == length]
            j = max(todo, key=lambda j: logp[j].max().item())
            when[i, j], logprobs[i, j] = step, logp[j, x[j]]
    return Rollout(
        encoded.input_ids.repeat(n, 1),
        encoded.attention_mask.repeat(n, 1),
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.zeros(n),
        torch.ones(n, dtype=torch.bool),
        settings(max_completion_length=length, steps=length, block_length=block).sampler_for(
            policy
        ),
        torch.randn(n, generator=generator_for(0, "rewards")),
        logprobs,
        when,
    )


@pytest.fixture(params=["mdm", "bd"])
def enumerated(request, shared_policies):
    """A policy of three tokens, away from its reference, and all it writes in two blocks of 2."""
    base = shared_policies[request.param]
    policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
    with torch.no_grad():
        policy.model.lm_head.weight *= 0.3
    policy.sync_reference()
    return moved(policy, 0.05), every_completion(policy, [100, 200, 300], 4, 2)


def test_probabilities_of_paths_sum_to_one(enumerated):
    policy, rollout = enumerated
    old = score_episodes(policy, rollout, 1000)
    logp = torch.zeros(81, 4).masked_scatter(torch.ones(81, 4).bool(), old.logp[0]).sum(1)
    torch.testing.assert_close(logp, rollout.logprobs.sum(1), atol=1e-4, rtol=1e-4)
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logp.exp().max() < 0.5


@torch.no_grad()
def test_the_sampler_takes_these_paths(enumerated):
    policy, rollout = enumerated
    config = settings(max_completion_length=4, steps=4, block_length=2)
    drawn, *_ = collect(
        policy,
        [{"prompt": "x"}],
        [parity],
        300,
        config.sampler_for(policy),
        generator_for(0, "x"),
        record=True,
    )
    index = {tuple(ids): i for i, ids in enumerate(rollout.completion_ids.tolist())}
    which = torch.tensor([index[tuple(ids)] for ids in drawn.completion_ids.tolist()])
    assert torch.equal(drawn.revealed_at, rollout.revealed_at[which])
    torch.testing.assert_close(drawn.logprobs, rollout.logprobs[which], atol=1e-4, rtol=1e-4)
    p = rollout.logprobs.sum(1).exp()
    likely = int(p.argmax())
    share, chance = (which == likely).float().mean().item(), p[likely].item()
    assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / 300)


def test_with_the_kl_in_the_reward_the_gradient_is_that_of_the_whole_objective(enumerated):
    """E[r] - beta KL(paths), summed over all paths, differentiated by autograd."""
    policy, rollout = enumerated
    beta = 0.7
    config = settings(max_completion_length=4, block_length=2, steps=4)
    parameters = [*policy.trainable_parameters().values()]
    old = score_episodes(policy, rollout, 1000)
    seen = score_states(policy, rollout, slice(0, 4))
    at = seen.revealed
    logp = log_probabilities(policy, seen.block[at])
    with policy.reference():
        ref = log_probabilities(policy, old.reference[0])
    drawn = logp.gather(1, seen.tokens[at][:, None])[:, 0]
    kl = kl_divergence(logp, ref)

    path, kl_of_path = (x.view(81, 4).sum(1) for x in (drawn, kl))  # one token a step
    objective = (path.exp() * (rollout.rewards - beta * kl_of_path)).sum()
    expected = torch.autograd.grad(objective, parameters, retain_graph=True)

    def gradient(in_reward):
        gains = old.rewards(beta if in_reward else 0.0)
        advantages = gae(gains, torch.zeros(81, 4), 1.0, 1.0)
        chance = path.detach().exp()[:, None].expand(81, 4).flatten()
        surrogate, charged, _ = ppo_loss(
            drawn,
            old.logp[0],
            kl * chance,
            advantages.flatten() * chance,
            torch.ones(324).bool(),
            beta,
            config,
        )
        found = torch.autograd.grad(surrogate + charged, parameters, retain_graph=True)
        return [-4 * slope for slope in found]  # the loss is divided by the length

    largest = max(slope.abs().max().item() for slope in expected)
    for found, slope in zip(gradient(True), expected, strict=True):
        torch.testing.assert_close(found, slope, atol=1e-4 * largest, rtol=1e-3)
    left_out = [a - b for a, b in zip(gradient(False), expected, strict=True)]
    assert max(slope.abs().max().item() for slope in left_out) > 0.05 * largest


# -- one update ------------------------------------------------------------------------------------


def advantages_of(old):
    return torch.randn(old.kl.shape, generator=generator_for(0, "advantages"))


def updated(policy, old, beta=0.0, **changes):
    parameters = policy.trainable_parameters()
    found = update(policy, old, advantages_of(old), beta, parameters, settings(**changes))
    return found, {n: p.grad.clone() for n, p in parameters.items()}


@pytest.mark.parametrize("lora", [False, True])
def test_at_the_first_inner_step_the_ratio_is_one_and_the_kl_zero(denoiser, lora):
    rollout = a_rollout(denoiser)
    if lora:
        add_lora(denoiser, r=4, lora_dropout=0.5)
    found, _ = updated(denoiser, scored(denoiser, rollout), beta=1.0)
    assert found["ratio/min"] == found["ratio/mean"] == found["ratio/max"] == 1
    assert found["kl"] == found["kl/max"] == found["loss/kl"] == 0
    assert found["clip_ratio"] == found["selection_drift"] == 0
    assert abs(found["log_mean_exp_neg_d"]) < 1e-6
    assert found["grad_norm/kl"] < 1e-4 < found["grad_norm/surrogate"]
    check_first_inner_step(found, True)


def test_a_policy_that_scores_the_same_states_differently_is_found_out(denoiser):
    old = scored(denoiser, a_rollout(denoiser))
    moved(denoiser, 1e-3)
    found, _ = updated(denoiser, old)
    with pytest.raises(RuntimeError, match=r"before any update the ratio is \d.* off 1"):
        check_first_inner_step(found, False)
    again, _ = updated(denoiser, scored(denoiser, old.rollout))
    check_first_inner_step(again, False)
    with pytest.raises(RuntimeError, match=r"KL reaches [1-9]"):
        check_first_inner_step(again, True)


def test_the_gradient_at_ratio_one_is_that_of_reinforce(denoiser):
    """Every revealed position, those behind the end of the text too, with its step's advantage."""
    rollout = a_rollout(denoiser)
    old = scored(denoiser, rollout)
    found, gradient = updated(denoiser, old)
    advantages = advantages_of(old)
    denoiser.model.zero_grad()
    total = 0.0
    for row in range(12):
        for step, inside, _, hidden, _ in single_states(denoiser, rollout, row):
            at = rollout.revealed_at[row, inside] == step
            logp = single_logp(denoiser, hidden[at])
            drawn = rollout.completion_ids[row, inside][at]
            total += advantages[row, step] * logp.gather(1, drawn[:, None]).sum()
    (-total / 8 / 12).backward()
    expected = {n: p.grad for n, p in denoiser.trainable_parameters().items()}
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-3, msg=name)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in expected.values()))
    assert found["grad_norm/surrogate"] == pytest.approx(norm, rel=1e-4)


def test_micro_batches_give_the_gradient_of_the_whole(denoiser):
    def reward(prompts, completions, completion_ids, **columns):
        return [None, None, *parity(prompts, completions, completion_ids)[2:]]

    rollout = a_rollout(denoiser, reward)
    whole, parts = (scored(denoiser, rollout, states) for states in (1000, 2))
    assert (len(whole.parts), len(parts.parts)) == (1, 36)
    moved(denoiser)
    found, expected = updated(denoiser, whole, beta=0.5)
    again, gradient = updated(denoiser, parts, beta=0.5)
    assert found["ratio/mean"] != 1
    assert found["kl"] > 0
    for metric, value in found.items():
        assert again[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=1e-4, rtol=1e-3, msg=name)
    # Samples that a reward left out have no part in it.
    kept = scored(denoiser, rollout.select(rollout.counted), 1000)
    kept.logp = [whole.logp[0].view(12, 8)[rollout.counted].flatten()]
    kept.reference = [whole.reference[0].view(12, 8, -1)[rollout.counted].flatten(0, 1)]
    alone = update(
        denoiser,
        kept,
        advantages_of(whole)[rollout.counted],
        0.5,
        denoiser.trainable_parameters(),
        settings(),
    )
    for metric in ("loss", "loss/kl", "grad_norm/surrogate", "grad_norm/kl"):
        assert alone[metric] == pytest.approx(found[metric], rel=1e-3, abs=1e-6)


def test_the_two_parts_add_up(denoiser):
    old = scored(denoiser, a_rollout(denoiser))
    moved(denoiser, 0.02)
    found, total = updated(denoiser, old, beta=0.5)
    _, surrogate = updated(denoiser, old)
    norm = math.sqrt(sum((total[n] - surrogate[n]).double().square().sum() for n in total))
    assert found["grad_norm/kl"] == pytest.approx(norm, rel=1e-3)
    assert found["loss"] == pytest.approx(found["loss/surrogate"] + found["loss/kl"])
    # Every position of every completion counts the same.
    assert found["loss/kl"] == pytest.approx(0.5 * found["kl"], rel=1e-4)
    assert found["kl/sum"] == pytest.approx(8 * found["kl"], rel=1e-4)


# -- the value function ----------------------------------------------------------------------------


def test_a_draw_that_records_nothing_is_refused(mdm, tmp_path):
    def unrecorded(policy, prompts, config, generator, record=False):
        return generate(policy, prompts, config, generator)

    small = {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}
    config = PPOConfig(output_dir=str(tmp_path), max_completion_length=4, value_batches=2, **small)
    with pytest.raises(InputError, match="its draw has to record one"):
        train_ppo(mdm, [parity], [{"prompt": "x"}], config, draw=unrecorded)


def test_a_value_head_is_saved_and_loaded(tmp_path):
    values = ValueHead(32)
    assert values(torch.ones(98)) == 0
    x = torch.randn(4, 5, 98, generator=generator_for(0, "x"))
    for number, tensor in enumerate(values.state_dict().values()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator_for(number, "w")).abs() + 0.1)
    z = (x - values.mean) / values.std
    weights, along = values.weight.split(98)
    expected = values.bias + z @ weights + x[..., -1] * (z @ along)
    torch.testing.assert_close(values(x), expected)
    values.save_pretrained(tmp_path / "values")
    assert {p.name for p in (tmp_path / "values").iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(ValueHead.from_pretrained(tmp_path / "values")(x), values(x))
    for name in ("config.json", "model.safetensors"):
        path = tmp_path / "values" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="values cannot be loaded: "):
            ValueHead.from_pretrained(tmp_path / "values")
        path.write_bytes(whole)


def ends(prompts, completions, completion_ids, **columns):
    """The text's length, which is decided once its first end token is revealed."""
    return [8 - len(ids) for ids in completion_ids]


def base_rollouts(policy, reward, count):
    """Of two prompts each, all of them different."""
    prompts = (f"A patient has {x} {n}. Why?" for n in range(count) for x in ("fever", "a rash"))
    rows = [{"prompt": prompt} for prompt in prompts]
    return [
        scored(policy, a_rollout(policy, reward, n, rows[2 * n : 2 * n + 2])) for n in range(count)
    ]


def fit_to(values, base):
    seen = []
    for old in base:
        counted, steps = old.rollout.counted, old.features.shape[1]
        returns = old.rollout.rewards[counted].float().repeat_interleave(steps)
        asked = [prompt for prompt in prompts_of(old.rollout.select(counted)) for _ in range(steps)]
        seen.append(ValueData(old.features[counted].flatten(0, 1), returns, asked))
    return fit(values, ValueData.joined(seen), Accelerator(cpu=True))


def test_the_first_fit_finds_what_states_say_of_the_outcome(denoiser):
    base = base_rollouts(denoiser, ends, 48)
    values = ValueHead(32)
    explained = fit_to(values, base[:40])
    said = torch.cat([values(old.features) for old in base[40:]])
    outcome = torch.cat([old.rollout.rewards for old in base[40:]])
    assert 0 < explained < explained_variance(said[:, 3], outcome)  # the first states say less
    found = stats.pearsonr(said[:, 3].detach(), outcome)
    assert found.statistic > 0 and found.pvalue < 1e-3


def test_of_what_states_say_nothing_the_first_fit_says_the_mean(denoiser):
    count = iter(range(1000))

    def noise(prompts, completions, **columns):
        return torch.randn(len(prompts), generator=generator_for(next(count), "noise")).tolist()

    base = base_rollouts(denoiser, noise, 16)
    values = ValueHead(32)
    assert fit_to(values, base) < 0.05
    mean = torch.cat([old.rollout.rewards for old in base]).mean().item()
    said = torch.cat([values(old.features) for old in base])
    assert said.mean().item() == pytest.approx(mean, abs=0.05)
    assert said.std() < 0.3  # of outcomes whose standard deviation is 1


def test_the_first_fit_is_ridge_regression_of_the_samples_that_count(denoiser, monkeypatch):
    monkeypatch.setattr("mdmrl.rl.values.PENALTIES", (0.1,))

    def some(prompts, completions, completion_ids, **columns):
        lengths = ends(prompts, completions, completion_ids)
        return [None if i % 5 == 0 else x for i, x in enumerate(lengths)]

    base = [scored(denoiser, a_rollout(denoiser, some, seed)) for seed in range(4)]
    values = ValueHead(32)
    fit_to(values, base)
    counted = torch.cat([old.rollout.counted for old in base])
    x = torch.cat([old.features for old in base])[counted].flatten(0, 1).double()
    y = torch.cat([old.rollout.rewards for old in base])[counted].double().repeat_interleave(5)
    mean, std = x.mean(0), x.std(0, correction=0)
    std[std < 1e-6] = 1
    torch.testing.assert_close(values.mean.double(), mean)
    torch.testing.assert_close(values.std.double(), std)
    z = (x - mean) / std
    z = torch.cat([z, x[:, -1:] * z], 1)
    # Least squares over the states and one more equation a weight, sqrt(penalty * states) w = 0.
    states, width = z.shape
    equations = torch.cat([z, math.sqrt(0.1 * states) * torch.eye(width)])
    constant = torch.cat([torch.ones(states, 1), torch.zeros(width, 1)])
    targets = torch.cat([y, torch.zeros(width)])[:, None]
    *weights, bias = torch.linalg.lstsq(torch.cat([equations, constant], 1), targets).solution[:, 0]
    expected = z @ torch.stack(weights) + bias
    found = values(x.float()).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_the_reference_states_are_looked_at_once(denoiser):
    rollout = a_rollout(denoiser)
    start = denoiser.positions_computed
    both = scored(denoiser, rollout)
    middle = denoiser.positions_computed
    alone = score_episodes(denoiser, rollout, 30, reference=False)
    assert denoiser.positions_computed - middle == (middle - start) / 2
    assert torch.equal(alone.features, both.features)
    assert all(torch.equal(*pair) for pair in zip(alone.logp, both.logp, strict=True))
    assert (alone.kl == 0).all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_half_a_text_is_finished_greedily(shared_policies, blocks):
    """Against a loop over single positions of single texts."""
    base = shared_policies["mdm"]
    policy = ender(type(base)(copy.deepcopy(base.model), base.tokenizer), 4)
    policy.model.double()
    policy.model.lm_head.float()
    rollout = a_rollout(policy, steps=8, block_length=8 // blocks)
    found = finished_greedily(policy, rollout)
    width = rollout.prompt_ids.shape[1]
    for row in range(0, len(rollout), 5):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        revealed_at = rollout.revealed_at[row]
        text = rollout.completion_ids[row].masked_fill(revealed_at >= 4, policy.mask_token_id)
        for _ in range(4):
            hidden = policy.forward(torch.cat([prompt, text])[None])[0, len(prompt) :]
            logp = single_logp(policy, hidden)
            surest = logp.amax(-1).masked_fill(text != policy.mask_token_id, -torch.inf)
            place = int(surest.argmax())
            text[place] = logp[place].argmax()
        assert torch.equal(found.sequences[row, width:], text)
    uneven = settings(steps=8, max_completion_length=12, half_text=True)
    with pytest.raises(ValueError, match=r"8 steps in 3 blocks .*expected 2 steps or more"):
        uneven.sampler_for(policy)


def test_a_run_rewarded_halfway_learns_another_policy(mdm, tmp_path):
    start, weights = copy.deepcopy(mdm.model.state_dict()), []
    for half in (False, True):
        mdm.model.load_state_dict(start)
        config = settings(tmp_path / str(half), steps=4, half_text=half, beta=0.0)
        rows = rows_of(train_ppo(mdm, [parity], ROWS, config))
        assert all(("halfway" in row) == half for row in rows[:3])
        weights.append(torch.cat([p.detach().flatten() for p in mdm.model.parameters()]))
    assert not torch.equal(*weights)


# -- runs ------------------------------------------------------------------------------------------

NAMES = {
    "reward",
    "loss",
    "loss/surrogate",
    "loss/kl",
    "kl",
    "kl/max",
    "log_mean_exp_neg_d",
    "grad_norm",
    "grad_norm/surrogate",
    "grad_norm/kl",
    "ratio/mean",
    "clip_ratio",
    "selection_drift",
    "max_logprob_mismatch",
    "values/explained_variance",
    "values/loss",
    "advantages/std",
    "token_forwards",
    "token_forwards/scoring",
    "skipped_updates",
    "step_time",
}


@pytest.mark.parametrize("family", ["mdm", "bd"])
def test_a_run_logs_what_it_promises_and_touches_nothing_global(
    family, request, tmp_path, rng_untouched
):
    policy = request.getfixturevalue(family)
    start = policy.fingerprint()
    config = settings(tmp_path / "run", eval_steps=2)
    folder = train_ppo(policy, [parity], ROWS, config, ROWS, lambda text, row: "e" in text)
    assert policy.fingerprint() != start
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/accuracy" in row for row in rows] == [True, False, True, True]
    for row in rows[:3]:
        assert row.keys() >= NAMES
        assert row["loss"] == pytest.approx(row["loss/surrogate"] + row["loss/kl"])
        assert row["max_logprob_mismatch"] < 1e-4
        # Sampling looks at each state once too; a block-causal sampler keeps more.
        if family == "mdm" and row["step"]:
            assert row["token_forwards/scoring"] == 4 * row["token_forwards"]
    assert rows[0]["token_forwards"] > 2 * rows[1]["token_forwards"]  # with V's first fit
    assert ["values/base_explained_variance" in row for row in rows[:2]] == [True, False]
    assert [len(row["completions"]) for row in rows_of(folder, "samples")] == [6] * 3
    values = ValueHead.from_pretrained(folder / "checkpoints" / "step-000003" / "values")
    assert values.config["hidden_size"] == 32


def test_v_without_reinforcement_learning_is_the_v_that_it_begins_with(mdm, tmp_path):
    config = settings(tmp_path / "run", max_steps=1, save_steps=1, value_learning_rate=1e-12)
    values, found = fit_to_base(mdm, [parity], ROWS, config)
    folder = train_ppo(mdm, [parity], ROWS, config)
    assert rows_of(folder)[0]["values/base_explained_variance"] == pytest.approx(found, abs=1e-4)
    begun = ValueHead.from_pretrained(folder / "checkpoints" / "step-000001" / "values")
    for name, tensor in begun.state_dict().items():
        torch.testing.assert_close(values.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)


def test_base_states_are_those_of_recorded_rollouts_with_discounted_outcomes(denoiser):
    config = settings(steps=4, per_device_train_batch_size=3, num_generations=1, gamma=0.9, seed=5)
    batches = list(base_states(denoiser, [parity], ROWS, config))
    assert len(batches) == 2
    for i, seen in enumerate(batches):
        rows = rows_of_step(ROWS, 3, i, 0, 1, derived_seed(5, "values"))
        generator = generator_for(5, "values", i, 0)
        sampler = config.sampler_for(denoiser)
        rollout, *_ = collect(denoiser, rows, [parity], 1, sampler, generator, record=True)
        features = score_episodes(denoiser, rollout, 1000, reference=False).features  # (3, 4, F)
        torch.testing.assert_close(seen.features, features.flatten(0, 1), atol=1e-4, rtol=1e-4)
        outcomes = [[r * 0.9**k for k in (3, 2, 1, 0)] for r in rollout.rewards.tolist()]
        torch.testing.assert_close(seen.returns, torch.tensor(outcomes).flatten())
        assert seen.prompts == [prompt for prompt in prompts_of(rollout) for _ in range(4)]


@pytest.mark.parametrize("in_reward", [False, True])
def test_a_charge_in_the_reward_keeps_its_proportion_to_it(mdm, tmp_path, monkeypatch, in_reward):
    """Normalising divides the rewards, so what is left of the KL in the loss is divided too."""
    seen, estimated = [], []

    def watched(policy, old, advantages, beta, *others):
        seen.append((old, advantages, beta))
        return update(policy, old, advantages, beta, *others)

    def estimating(rewards, values, gamma, lam):
        estimated.append((rewards, lam))
        return gae(rewards, values, gamma, lam)

    monkeypatch.setattr(ppo, "update", watched)
    monkeypatch.setattr(ppo, "gae", estimating)
    config = settings(tmp_path / "run", beta=0.5, kl_in_reward=in_reward, num_iterations=1)
    rows = rows_of(train_ppo(mdm, [parity], ROWS, config))[:-1]
    gains = [rewards for rewards, lam in estimated if lam == 0.95]
    for (old, advantages, beta), rewards, row in zip(seen, gains, rows, strict=True):
        assert torch.equal(
            rewards[:, -1], old.rollout.rewards.float() - 0.5 * in_reward * old.kl[:, -1]
        )
        assert torch.equal(rewards[:, :-1], -0.5 * in_reward * old.kl[:, :-1])
        assert beta == pytest.approx(0.5 / row["advantages/std"] if in_reward else 0.5)
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std(unbiased=False).item() == pytest.approx(1, abs=0.01)
    assert old.kl.mean() > 0


def final_state(policy, folder):
    state = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    state |= {f"reference/{n}": p.clone() for n, p in policy.reference_state().items()}
    (checkpoint,) = (folder / "checkpoints").iterdir()
    values = ValueHead.from_pretrained(checkpoint / "values")
    return state | {f"values/{n}": p for n, p in values.state_dict().items()}


@pytest.fixture(scope="module", params=["mdm-lora", "bd"])
def uninterrupted(request, shared_policies, tmp_path_factory):
    """A way to start the run, and what it gives when nothing happens."""
    base = shared_policies[request.param.partition("-")[0]]

    def start(folder, reward):
        policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
        if "lora" in request.param:
            add_lora(policy, r=4, seed=3)
        config = settings(
            folder,
            max_steps=5,
            save_steps=2,
            eval_steps=3,
            ref_model_sync_steps=3,
            kl_in_reward=True,
        )
        try:
            train_ppo(policy, [reward], ROWS, config, ROWS[:1], lambda text, row: "e" in text)
        except Interrupted:
            return None
        return policy

    folder = tmp_path_factory.mktemp("whole") / "run"
    reward = Cut()
    policy = start(folder, reward)
    return start, folder, final_state(policy, folder), reward.calls


def timeless(folder):
    kept = rows_of(folder)
    return [{k: v for k, v in row.items() if not k.endswith("_time")} for row in kept]


# Calls: evaluation, rollout, two base rollouts; then one rollout a step, evaluation at step 3.
@pytest.mark.parametrize("cuts", [(3,), (6, 4), (-1,)])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(uninterrupted, tmp_path, cuts):
    start, whole, expected, calls = uninterrupted
    for cut in cuts:
        assert start(tmp_path / "run", Cut(cut if cut > 0 else calls)) is None
    resumed = start(tmp_path / "run", Cut())
    found = final_state(resumed, tmp_path / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert timeless(tmp_path / "run") == timeless(whole)
    assert rows_of(tmp_path / "run", "samples") == rows_of(whole, "samples")


def test_a_complete_run_is_not_trained_again(uninterrupted):
    start, whole, expected, _ = uninterrupted
    before = (whole / "metrics.jsonl").read_bytes()
    again = final_state(start(whole, Cut(1)), whole)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mdm", {}),
        ("bd", {"kl_in_reward": True, "beta": 0.002}),
        ("bd", {"clip": "cispo", "num_generations": 1}),
    ],
    ids=str,
)
def test_a_toy_reward_rises(family, changes, request, tmp_path):
    """The share of odd token ids, about a half at the start."""
    policy = request.getfixturevalue(family)
    config = settings(
        tmp_path / "run",
        max_steps=16,
        steps=4,
        states_per_forward=48,
        learning_rate=2e-2,
        max_grad_norm=1.0,
        **{"beta": 0.0} | changes,
    )
    rewards = [row["reward"] for row in rows_of(train_ppo(policy, [parity], ROWS, config))[:-1]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.2


def test_samples_that_no_reward_judges_leave_the_policy_as_it_is(mdm, tmp_path):
    def silent(prompts, completions, completion_ids, **columns):
        return [None] * len(prompts)

    before = mdm.fingerprint()
    folder = train_ppo(mdm, [silent], ROWS, settings(tmp_path / "run", max_steps=1))
    assert mdm.fingerprint() == before
    assert rows_of(folder)[0]["skipped_updates"] == 0


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(mdm, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "kl_divergence", lambda logp, ref: (logp - ref).sum(-1) + math.inf)
    monkeypatch.setattr(ppo, "check_first_inner_step", lambda found, synced: None)
    before = {n: p.detach().clone() for n, p in mdm.model.named_parameters()}
    config = settings(tmp_path / "run", max_steps=9, num_iterations=1)
    with pytest.raises(FloatingPointError, match=r"5 updates in a row.*step 4 on prompts"):
        train_ppo(mdm, [parity], ROWS, config)
    assert all(torch.equal(p, before[n]) for n, p in mdm.model.named_parameters())
    assert [row["skipped_updates"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon=0.0: expected \(0, 1\)"),
        ({"epsilon": 1.0}, "epsilon=1.0"),
        ({"lam": 1.1}, r"lam=1.1: expected \[0, 1\]"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"beta": -1}, "beta=-1.0"),
        ({"clip": "two-sided"}, "did you mean 'two_sided'"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"num_generations": 5}, "num_generations=5, per_device_train_batch_size x .* = 12"),
        ({"block_length": 3}, "block_length=3: expected a divisor"),
        ({"steps": 1}, "steps=1: expected at least 2, one for each block"),
        ({"value_batches": 1}, "value_batches=1"),
        ({"states_per_forward": 0}, "states_per_forward=0"),
        ({"cliprange_value": math.inf}, "cliprange_value=inf"),
        ({"remasking": "random"}, "expected steps, step_sizes and block_length alone"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_policies_that_have_no_such_episodes_are_refused_before_any_work(ar, bd, tmp_path):
    config = settings(tmp_path / "run")
    with pytest.raises(ValueError, match="kind 'ar' has no denoising steps"):
        train_ppo(ar, [parity], ROWS, config)
    with pytest.raises(
        ValueError, match="block_length=8: this policy was trained with blocks of 4"
    ):
        train_ppo(bd, [parity], ROWS, config.replace(sampler={"block_length": 8}))
    with pytest.raises(ValueError, match="block_length=4: expected a divisor of max_new_tokens=6"):
        train_ppo(bd, [parity], ROWS, config.replace(sampler={}, max_completion_length=6))
    with pytest.raises(ValueError, match="no reward"):
        train_ppo(bd, [], ROWS, config)
    assert not (tmp_path / "run").exists()


def test_block_diffusion_takes_its_own_blocks_and_masked_diffusion_may_have_one(bd, mdm):
    config = settings(block_length=None)
    assert config.sampler_for(bd).block_length == 4
    assert config.sampler_for(mdm).block_length is None
    assert config.sampler_for(mdm, greedy=True).temperature == 0


# -- several processes -----------------------------------------------------------------------------

TWO_PROCESSES = r"""
import hashlib, os, sys
from mdmrl import PPOConfig, load_policy, train_ppo
from mdmrl.rl.values import fit_to_base

def short(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]

folder, output = sys.argv[1:]
policy = load_policy(folder)
rows = [{"prompt": f"What is {i}?"} for i in range(8)]
config = PPOConfig(
    output_dir=output, max_steps=2, sampler={"steps": 4}, max_completion_length=8,
    num_generations=2, per_device_train_batch_size=4, value_batches=2,
)
values, _ = fit_to_base(policy, [short], rows[int(os.environ["RANK"]) :: 2], config)
state = b"".join(x.numpy().tobytes() for x in values.state_dict().values())
sys.stdout.write(f"V {hashlib.sha256(state).hexdigest()}\n")
train_ppo(policy, [short], rows, config)
weights = b"".join(p.detach().numpy().tobytes() for p in policy.model.parameters())
sys.stdout.write(f"weights {hashlib.sha256(weights).hexdigest()}\n")
"""


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_keep_the_same_weights(bd, tmp_path):
    bd.save_pretrained(tmp_path / "policy")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path / "policy", tmp_path / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("weights", "V"):  # V of other prompts on each
        said = [line for line in done.stdout.splitlines() if line.startswith(name)]
        assert len(said) == 2 and len(set(said)) == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2]
