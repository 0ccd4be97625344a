"""GRPO against scalar re-implementations, and what a run must survive."""

import copy
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import Cut, Interrupted, nested, parity

import mdmrl.rl.grpo as grpo
import mdmrl.rl.rounds as rounds
from mdmrl.policies import add_lora
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import grpo_loss, train_grpo, update
from mdmrl.rl.kl import KL_ESTIMATORS
from mdmrl.rl.logprobs import ESTIMATORS, draw_noise, estimator
from mdmrl.rl.rollout import Rollout, collect, group_advantages
from mdmrl.rl.scoring import adapted
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.tasks import load_rows
from mdmrl.training.data import rows_of_step

ROWS = [{"prompt": f"A patient has {x}. Which test is decisive?"} for x in ("fever", "a rash", "x")]


def length(prompts, completions, completion_ids, **columns):
    """The shorter the better."""
    return [-len(ids) / 10 for ids in completion_ids]


def settings(folder="unused", policy=None, **changes):
    small = {
        "output_dir": str(folder),
        "max_steps": 3,
        "max_completion_length": 10,
        "logp_estimator": "one_step",
        "learning_rate": 1e-3,
        "max_grad_norm": 1e6,
        "log_gradients": True,
    }
    own = {"logp_estimator": "exact"} if policy and not policy.denoises else {"steps": 5}
    return GRPOConfig.thesis(**nested(small | own | changes))


def a_rollout(policy, reward=parity, temperature=1.0, **changes):
    """Two groups of six, with prompts of different lengths and, mostly, several end positions."""
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[policy.tokenizer.eos_token_id] *= 4
    steps = 5 if policy.denoises else None
    config = SamplerConfig(max_new_tokens=10, steps=steps, temperature=temperature, **changes)
    rollout, *_ = collect(policy, ROWS[:2], [reward], 6, config, generator_for(0, "rollout"))
    assert not rollout.prompt_mask.all()
    return rollout


def no_noise(rollout):
    return draw_noise(rollout, 0.0, generator_for(0, "noise"))


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# -- rollouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "goes_on"), [("ar_style", True), ("one_step", False)])
def test_texts_are_written_on_behind_their_end_only_where_that_is_read(
    mdm, tmp_path, monkeypatch, name, goes_on
):
    with torch.no_grad():
        mdm.model.get_output_embeddings().weight[mdm.tokenizer.eos_token_id] *= 4
    seen = []

    def recorded(*args, **options):
        seen.append(collect(*args, **options))
        return seen[-1]

    monkeypatch.setattr(rounds, "collect", recorded)
    changes = {"logp_estimator": name, "max_steps": 1, "end_last": False, "steps": 10}
    train_grpo(mdm, [parity], ROWS, settings(tmp_path / "run", **changes))
    ((rollout, metrics, _),) = seen
    assert not rollout.completion_mask.all()
    assert (metrics["token_forwards"] == 12 * 10 * rollout.prompt_ids.shape[1] + 1200) == goes_on


# -- advantages ------------------------------------------------------------------------------------


def scalar_advantages(group):
    counted = [r for r in group if not math.isnan(r)]
    if len(counted) < 2 or max(counted) - min(counted) < 1e-9:
        return [0.0] * len(group)
    mean = sum(counted) / len(counted)
    std = math.sqrt(sum((r - mean) ** 2 for r in counted) / (len(counted) - 1))
    return [0.0 if math.isnan(r) else (r - mean) / (std + 1e-4) for r in group]


NAN = math.nan
GROUPS = [
    [1.0, 2.0, 3.0, 4.0],
    [0.1 + 0.2, 0.3, 0.3, 0.3],  # equal but for rounding
    [0.0, 0.0, 0.0, 0.0],
    [NAN, 1.0, 2.0, 4.0],
    [NAN, NAN, NAN, 1.0],
    [NAN, NAN, NAN, NAN],
    [-1e3, 1e3, 0.0, 5.0],
    [0.0, 1e-5, 2e-5, 0.0],  # the 1e-4 counts
    [250.0, 250.0, NAN, 250.0],
]


def test_advantages_equal_a_scalar_loop():
    flat = torch.tensor(GROUPS, dtype=torch.float64).flatten()
    found, counted = group_advantages(flat, 4)
    expected = torch.tensor([scalar_advantages(group) for group in GROUPS]).flatten()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(counted, ~flat.isnan())


# -- the loss --------------------------------------------------------------------------------------


def scalar_loss(logp, old, ref, rollout, config):
    surrogate, kl = 0.0, 0.0
    low, high = 1 - config.epsilon, 1 + config.epsilon
    for i in range(len(rollout)):
        if not rollout.counted[i]:
            continue
        a, n = rollout.advantages[i].item(), int(rollout.completion_mask[i].sum())
        for k in range(n):
            ratio = math.exp(logp[i][k] - old[i][k])
            surrogate -= min(ratio * a, min(max(ratio, low), high) * a) / n
            d = logp[i][k] - ref[i][k]
            k3 = math.exp(-d) + d - 1
            value = {"k1": d, "k2": d * d / 2, "k3": k3, "k3_ratio": ratio * k3}
            value = value[config.kl_estimator]
            kl += config.beta * value / n
    return surrogate, kl


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 8)
    logp, old, ref = (-3 * torch.rand(shape, generator=generator).double() for _ in range(3))
    lengths = torch.randint(1, 9, (6,), generator=generator)
    mask = torch.arange(8) < lengths[:, None]
    counted = torch.tensor([True, True, False, True, True, True])
    advantages = torch.randn(6, generator=generator) * counted
    ids = torch.zeros(shape, dtype=torch.long)
    sampler = SamplerConfig(temperature=1.0)
    rollout = Rollout(ids, mask, ids, mask, advantages.double(), counted, sampler)
    return logp, old, ref, rollout


@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_equals_a_scalar_loop(kl_estimator, beta):
    logp, old, ref, rollout = random_case()
    config = settings(kl_estimator=kl_estimator, beta=beta, epsilon=0.2, log_kl=not beta)
    surrogate, kl, tokens = grpo_loss(logp, old, ref, rollout, config)
    expected = scalar_loss(logp.tolist(), old.tolist(), ref.tolist(), rollout, config)
    assert (surrogate.item(), kl.item()) == pytest.approx(expected)
    mask = rollout.completion_mask
    ratio, up = (logp - old).exp(), (rollout.advantages > 0)[:, None]
    above, below = (ratio > 1.2) & up & mask, (ratio < 0.8) & ~up & mask
    assert above.any()
    assert below.any()
    zero = rollout.advantages[:, None] == 0
    assert torch.equal(tokens["clipped"] & mask & ~zero, (above | below) & ~zero)


def test_clipped_tokens_have_no_gradient_and_others_that_of_the_ratio():
    logp, old, ref, rollout = random_case(1)
    config = settings(epsilon=0.2)
    logp.requires_grad_()
    surrogate, *_ = grpo_loss(logp, old, ref, rollout, config)
    surrogate.backward()
    for i in range(len(rollout)):
        a, n = rollout.advantages[i].item(), int(rollout.completion_mask[i].sum())
        for k in range(8):
            ratio = math.exp(logp[i, k].item() - old[i, k].item())
            free = (ratio < 1.2) if a > 0 else (ratio > 0.8)
            expected = -a * ratio / n if k < n and free else 0.0
            assert logp.grad[i, k].item() == pytest.approx(expected)


def test_without_beta_an_exploding_kl_does_not_reach_the_loss():
    """exp(-d) overflows float32 beyond 88 nats, and 0 times infinity is no number."""
    _, _, _, rollout = random_case()
    logp = torch.full((6, 8), -100.0, requires_grad=True)
    ref = torch.zeros(6, 8)
    surrogate, kl, _ = grpo_loss(logp, logp.detach(), ref, rollout, settings(beta=0.0))
    (gradient,) = torch.autograd.grad(surrogate + kl, logp)
    assert kl.item() == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators_by_enumeration(name):
    """Values and gradients on a categorical distribution, summed over all its outcomes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator).double().requires_grad_()
    ref = (logits.detach() + 0.02 * torch.randn(7, generator=generator)).log_softmax(0)
    logp = logits.log_softmax(0)
    p, q = logp.exp(), ref.exp()
    estimate = (p.detach() * KL_ESTIMATORS[name](logp - ref)).sum()
    forward, backward = (p * (logp - ref)).sum(), (q * (ref - logp)).sum()
    assert estimate.item() == pytest.approx(forward.item(), rel=0.05 if name == "k2" else 1e-9)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    targets = {"k1": 0 * forward, "k2": forward, "k3": backward}
    torch.testing.assert_close(gradient(estimate), gradient(targets[name]), atol=1e-12, rtol=1e-9)


# -- one update ------------------------------------------------------------------------------------


CASES = [("ar", "exact"), ("mdm", "ar_style"), ("mdm", "one_step")]


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("lora", [False, True])
def test_at_the_first_inner_step_the_ratio_is_one_and_the_kl_zero(request, family, name, lora):
    policy = request.getfixturevalue(family)
    rollout = a_rollout(policy)
    if lora:
        add_lora(policy, r=4, lora_dropout=0.5)
    else:
        policy.sync_reference()
    noise = draw_noise(rollout, 0.3, generator_for(0, "noise"))
    found = update(
        policy,
        rollout,
        estimator(name, policy),
        noise,
        None,
        policy.trainable_parameters(),
        settings(logp_estimator=name),
    )
    assert found["ratio/mean"] == found["ratio/max"] == 1
    assert found["kl"] == found["kl/max"] == found["kl/sum"] == found["loss/kl"] == 0
    assert abs(found["log_mean_exp_neg_d"]) < 1e-6
    assert found["clip_ratio"] == 0
    assert found["grad_norm/kl"] == 0
    assert found["grad_norm/surrogate"] > 0


def gradients(policy):
    return {n: p.grad.clone() for n, p in policy.trainable_parameters().items()}


def updated(policy, rollout, name="exact", old=None, **changes):
    config = settings(logp_estimator=name, **changes)
    parameters = policy.trainable_parameters()
    found = update(
        policy, rollout, estimator(name, policy), no_noise(rollout), old, parameters, config
    )
    return found, gradients(policy)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_at_ratio_one_is_that_of_reinforce(ar, temperature):
    rollout = a_rollout(ar, temperature=temperature)
    assert rollout.completion_mask.sum(1).unique().numel() > 1
    ar.sync_reference()
    found, gradient = updated(ar, rollout, beta=0.0)
    ar.model.zero_grad()
    total = 0.0
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        written = rollout.completion_ids[i][rollout.completion_mask[i]]
        logits = ar.model(input_ids=torch.cat([prompt, written])[None]).logits[0]
        logp = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        total += rollout.advantages[i] * logp.gather(1, written[:, None]).mean()
    (-total / len(rollout)).backward()
    expected = gradients(ar)
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3, msg=name)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in expected.values()))
    assert found["grad_norm/surrogate"] == pytest.approx(norm, rel=1e-4)
    assert found["loss"] == found["loss/surrogate"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_micro_batches_give_the_gradient_of_the_whole(request, family, name):
    policy = request.getfixturevalue(family)

    def reward(prompts, completions, completion_ids, **columns):
        values = parity(prompts, completions, completion_ids)
        return [None, None, *values[2:]]  # so that the halves count differently

    rollout = a_rollout(policy, reward)
    policy.sync_reference()
    with torch.no_grad():
        old = ESTIMATORS[name](policy, rollout, no_noise(rollout))
        for weight in policy.trainable_parameters().values():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator_for(0, "move")))
    whole, expected = updated(policy, rollout, name, old)
    parts, found = updated(
        policy, rollout, name, old, per_device_train_batch_size=6, gradient_accumulation_steps=2
    )
    assert whole["ratio/mean"] != 1
    assert whole["kl"] > 0
    for metric, value in whole.items():
        assert parts[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, atol=1e-4, rtol=1e-3, msg=weight)


def test_the_two_parts_add_up_and_the_log_says_what_they_are(mdm):
    rollout = a_rollout(mdm)
    mdm.sync_reference()
    with torch.no_grad():
        for weight in mdm.trainable_parameters().values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator_for(0, "move")))
        with mdm.reference():
            ref = ESTIMATORS["one_step"](mdm, rollout, no_noise(rollout))
        logp = ESTIMATORS["one_step"](mdm, rollout, no_noise(rollout))
    found, total = updated(mdm, rollout, "one_step", beta=0.5)
    _, surrogate = updated(mdm, rollout, "one_step", beta=0.0)
    norm = math.sqrt(sum((total[n] - surrogate[n]).double().square().sum() for n in total))
    assert found["grad_norm/kl"] == pytest.approx(norm, rel=1e-3)
    assert found["loss"] == pytest.approx(found["loss/surrogate"] + found["loss/kl"])
    d = (logp - ref)[rollout.completion_mask].double()
    k3 = (-d).exp() + d - 1
    assert found["kl"] == pytest.approx(k3.mean().item(), rel=1e-4)
    assert found["kl/max"] == pytest.approx(k3.max().item(), rel=1e-4)
    assert found["kl/sum"] == pytest.approx(k3.sum().item() / 12, rel=1e-4)
    assert found["log_mean_exp_neg_d"] == pytest.approx(math.log((-d).exp().mean()), rel=1e-3)
    lengths = rollout.completion_mask.sum(1)
    by_completion = torch.zeros(12, dtype=torch.float64)
    by_completion.index_add_(0, torch.arange(12).repeat_interleave(lengths), k3)
    mean = (by_completion / lengths).mean().item()
    assert found["loss/kl"] == pytest.approx(0.5 * mean, rel=1e-4)


# -- estimators ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_is_the_log_softmax_of_transformers(ar, temperature):
    rollout = a_rollout(ar, temperature=temperature)
    found = estimator("exact", ar)(ar, rollout, no_noise(rollout))
    assert found.dtype == torch.float32
    assert (found[~rollout.completion_mask] == 0).all()
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        written = rollout.completion_ids[i][rollout.completion_mask[i]]
        logits = ar.model(input_ids=torch.cat([prompt, written])[None]).logits[0]
        logp = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(1, written[:, None])[:, 0]
        torch.testing.assert_close(found[i, : len(written)], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), [("ar", "exact"), ("mdm", "one_step")])
def test_scores_are_the_samplers_own_probabilities(request, family, name):
    """`exact` for the left-to-right sampler, `one_step` for one denoising step."""
    policy = request.getfixturevalue(family)
    own = {"steps": 1, "suppress_mask": False} if policy.denoises else {}
    config = SamplerConfig(max_new_tokens=10, temperature=0.8, **own)
    out = generate(policy, [row["prompt"] for row in ROWS], config, generator_for(0, "x"))
    rollout = Rollout.of(out, torch.zeros(3), torch.ones(3).bool(), config)
    found = estimator(name, policy)(policy, rollout, no_noise(rollout))
    torch.testing.assert_close(found, out.logprobs * out.completion_mask, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_which_tokens_a_score_depends_on(request, family, name):
    """`one_step` on none, `exact` on those before, `ar_style` on all, itself included."""
    policy = request.getfixturevalue(family)
    rollout = a_rollout(policy)
    rollout.completion_mask[:] = True
    f = estimator(name, policy)
    before = f(policy, rollout, no_noise(rollout))
    for changed in range(10):
        other = copy.deepcopy(rollout)
        other.completion_ids[:, changed] = (other.completion_ids[:, changed] + 1) % 1000 + 5
        moved = (f(policy, other, no_noise(other)) != before).any(0)
        same = (f(policy, other, no_noise(other)) == before).all(0)
        rest = torch.arange(10) != changed
        if name == "one_step":
            assert same[rest].all()
        elif name == "exact":
            assert same[:changed].all()
            assert moved[changed + 1 :].all()
        else:
            assert moved[rest].all()


@torch.no_grad()
def test_prompt_masks_cover_real_tokens_at_their_rate_and_change_the_score(mdm):
    rollout = a_rollout(mdm)
    many = Rollout(**{**vars(rollout), "prompt_mask": rollout.prompt_mask.repeat(200, 1)})
    many.prompt_ids = rollout.prompt_ids.repeat(200, 1)
    masked = draw_noise(many, 0.3, generator_for(0, "noise")).prompt_masked
    assert not (masked & ~many.prompt_mask).any()
    n = int(many.prompt_mask.sum())
    assert abs(int(masked.sum()) - 0.3 * n) < 4 * math.sqrt(n * 0.3 * 0.7)
    noise = draw_noise(rollout, 0.3, generator_for(0, "noise"))
    f = estimator("one_step", mdm)
    found = f(mdm, rollout, noise)
    assert not torch.equal(found, f(mdm, rollout, no_noise(rollout)))
    masked_prompt = torch.where(noise.prompt_masked, mdm.mask_token_id, rollout.prompt_ids)
    by_hand = Rollout(**{**vars(rollout), "prompt_ids": masked_prompt})
    assert torch.equal(found, f(mdm, by_hand, no_noise(rollout)))


def test_an_estimator_is_refused_for_the_wrong_family(ar, mdm):
    with pytest.raises(ValueError, match=r"'one_step'.* of kind 'ar': expected 'exact'"):
        estimator("one_step", ar)
    assert estimator("ar_style", ar) is ESTIMATORS["exact"]  # the same call
    with pytest.raises(ValueError, match=r"'exact'.*'mdm'.*'ar_style' or 'one_step'"):
        estimator("exact", mdm)
    with pytest.raises(ValueError, match="did you mean 'one_step'"):
        estimator("one_stp", mdm)


def test_a_wrong_estimator_is_refused_before_any_work(ar, tmp_path):
    with pytest.raises(ValueError, match="one_step"):
        train_grpo(ar, [length], ROWS, settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# -- rows ------------------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_and_processes_share_them():
    rows = [{"prompt": i} for i in range(7)]
    alone = [
        row["prompt"] for step in range(14) for row in rows_of_step(rows, 3, step, 0, 1, seed=1)
    ]
    epochs = [alone[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    shared = [
        row["prompt"]
        for step in range(7)
        for rank in range(2)
        for row in rows_of_step(rows, 3, step, rank, 2, seed=1)
    ]
    assert shared == alone
    other = [
        row["prompt"] for step in range(14) for row in rows_of_step(rows, 3, step, 0, 1, seed=2)
    ]
    assert other != alone


# -- rewards ---------------------------------------------------------------------------------------


def test_a_sample_left_out_has_no_part_in_the_update(ar):
    def only_some(prompts, completions, completion_ids, **columns):
        values = parity(prompts, completions, completion_ids)
        return [None if i % 3 == 0 else v for i, v in enumerate(values)]

    rollout = a_rollout(ar, only_some)
    assert rollout.counted.tolist() == [i % 3 != 0 for i in range(12)]
    ar.sync_reference()
    with torch.no_grad():
        old = estimator("exact", ar)(ar, rollout, no_noise(rollout)) - 0.05
    found, expected = updated(ar, rollout, old=old)
    kept = Rollout(
        **{k: v[rollout.counted] if torch.is_tensor(v) else v for k, v in vars(rollout).items()}
    )
    alone, gradient = updated(ar, kept, old=old[rollout.counted])
    assert found["loss/surrogate"] == pytest.approx(
        alone["loss/surrogate"],
        abs=1e-7,  # float32 means of terms of order 1 that cancel
    )
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=1e-5, rtol=1e-3, msg=name)


# -- runs ------------------------------------------------------------------------------------------

NAMES = {
    "step",
    "reward",
    "reward_std",
    "rewards/length/mean",
    "loss",
    "loss/surrogate",
    "loss/kl",
    "kl",
    "kl/sum",
    "kl/max",
    "log_mean_exp_neg_d",
    "grad_norm",
    "grad_norm/surrogate",
    "grad_norm/kl",
    "ratio/mean",
    "ratio/max",
    "clip_ratio",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "repetition",
    "frac_reward_zero_std",
    "step_time",
    "rollout_time",
    "token_forwards",
    "token_forwards/scoring",
    "num_tokens",
    "eval/reward",
    "eval/accuracy",
}


def test_a_run_logs_what_it_promises_and_touches_nothing_global(policy, tmp_path, rng_untouched):
    config = settings(tmp_path / "run", policy, eval_steps=2, num_iterations=2)
    start = policy.fingerprint()
    rewards = [length, parity]
    folder = train_grpo(policy, rewards, ROWS, config, ROWS, lambda text, row: "e" in text)
    assert policy.fingerprint() != start
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0].keys() >= NAMES
    assert ("leftover_mask_rate" in rows[0]) == (policy.kind == "mdm")
    assert ["eval/accuracy" in row for row in rows] == [True, False, True, True]
    for row in rows[:3]:
        assert row["loss"] == pytest.approx(row["loss/surrogate"] + row["loss/kl"])
        assert all(isinstance(value, int | float) for value in row.values())
    assert rows[0]["ratio/mean"] != 1  # of the last inner iteration
    # New and reference policy at both inner iterations, the old one once.
    a_row = rows[2]["token_forwards/scoring"] / (5 * config.per_device_train_batch_size)
    widths = {policy.encode([row["prompt"]]).input_ids.shape[1] for row in ROWS}
    assert a_row - config.max_completion_length in widths
    samples = rows_of(folder, "samples")
    assert [len(row["completions"]) for row in samples] == [6] * 3


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_follows_every_so_many_updates(policy, tmp_path, lora):
    """With one inner step the ratio is always 1, and the KL 0 right after the reference moved."""
    if lora:
        add_lora(policy, r=4)
    config = settings(tmp_path / "run", policy, max_steps=7, ref_model_sync_steps=3)
    rows = rows_of(train_grpo(policy, [parity], ROWS, config))[:-1]
    assert {row["ratio/mean"] for row in rows} == {row["ratio/max"] for row in rows} == {1}
    assert [row["kl"] == 0 for row in rows] == [True, False, False, True, False, False, True]
    assert all(row["grad_norm/surrogate"] > 0 for row in rows)


def final_state(policy):
    state = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    return state | {f"reference/{n}": p.clone() for n, p in policy.reference_state().items()}


RESUMED = {
    "ar": {"num_iterations": 1},
    "mdm-lora": {"num_iterations": 2},
    "ar-lora": {"num_iterations": 2, "ref_model_sync_steps": 100},
    "mdm-spg": {"loss_type": "spg", "logp_estimator": "complementary"},
    "mdm-charged": {
        "num_iterations": 2,
        "loss_type": "dapo",
        "importance_sampling_level": "sequence",
        "kl_in_reward": True,
        "kl_estimator": "k1",
        "beta": 0.01,
    },
    "mdm-adapted": {"kl_estimator": "k3_ratio", "beta": 0.2, "target_kl": 1e-3},
}


SLOW = ("mdm-spg", "mdm-charged")


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in RESUMED],
)
def uninterrupted(request, shared_policies, tmp_path_factory):
    """A way to start the run, and what it gives when nothing happens."""
    base = shared_policies[request.param.partition("-")[0]]

    def start(folder, reward):
        policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
        if "lora" in request.param:
            add_lora(policy, r=4, seed=3)
        changes = {"ref_model_sync_steps": 3} | RESUMED[request.param]
        config = settings(
            folder, policy, max_steps=7, save_steps=2, eval_steps=3, learning_rate=3e-3, **changes
        )
        try:
            train_grpo(policy, [reward], ROWS, config, ROWS[:1], lambda text, row: "e" in text)
        except Interrupted:
            return None
        return policy

    folder = tmp_path_factory.mktemp("whole") / "run"
    reward = Cut()
    policy = start(folder, reward)
    return start, folder, final_state(policy), reward.calls


def timeless(folder):
    kept = rows_of(folder)
    return [{k: v for k, v in row.items() if not k.endswith("_time")} for row in kept]


@pytest.mark.parametrize("cuts", [(2,), (7, 4), (-1,)])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(uninterrupted, tmp_path, cuts):
    start, whole, expected, calls = uninterrupted
    for cut in cuts:
        assert start(tmp_path / "run", Cut(cut if cut > 0 else calls)) is None
        if (tmp_path / "run" / "metrics.jsonl").exists():
            with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
                file.write('{"step": 9, "loss"')  # the line that the crash cut short
    resumed = start(tmp_path / "run", Cut())
    found = final_state(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert timeless(tmp_path / "run") == timeless(whole)
    assert rows_of(tmp_path / "run", "samples") == rows_of(whole, "samples")


def test_the_weight_of_the_kl_follows_its_target(mdm, tmp_path):
    asked = {"beta": 0.4, "target_kl": 0.01, "ref_model_sync_steps": 100, "max_steps": 8}
    config = settings(tmp_path / "run", mdm, learning_rate=0.02, **asked)
    rows = rows_of(train_grpo(mdm, [parity], ROWS, config))
    weights = [row["beta"] for row in rows[:8]]
    assert weights[0] == 0.4
    for row, weight, following in zip(rows, weights, weights[1:], strict=False):
        kl = row["kl"]
        factor = 2 if kl > 0.015 else 0.5 if kl < 0.01 / 1.5 else 1
        assert following == weight * factor
        assert row["loss/kl"] == pytest.approx(weight * kl, rel=0.5)
    steps = {b / a for a, b in itertools.pairwise(weights)}
    assert steps >= {0.5, 2.0}, weights


@pytest.mark.parametrize("kl", [0.0, 9.0])
def test_the_weight_of_the_kl_stays_a_weight_whatever_the_kl(kl):
    beta = 0.05
    for _ in range(2000):
        beta = adapted(beta, kl, 0.1)
    GRPOConfig(beta=beta, target_kl=0.1)  # which refuses 0 and what is infinite
    assert adapted(beta, 9.0 - kl, 0.1) in (2 * beta, beta / 2)


def test_a_complete_run_is_not_trained_again(uninterrupted, tmp_path):
    start, whole, expected, _ = uninterrupted
    before = (whole / "metrics.jsonl").read_bytes()
    again = final_state(start(whole, Cut(1)))
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_complete_run_without_its_weights_does_not_pass_off_the_start_as_the_end(ar, tmp_path):
    import shutil

    start = copy.deepcopy(ar.model)
    config = settings(tmp_path / "run", ar)
    folder = train_grpo(ar, [length], ROWS, config)
    expected = ar.fingerprint()
    shutil.rmtree(folder / "checkpoints")
    ar.model = start
    try:
        train_grpo(ar, [length], ROWS, config)
    except (ValueError, OSError):
        return  # refused
    assert ar.fingerprint() == expected  # or trained again


def test_an_edited_reward_makes_another_run(ar, tmp_path, monkeypatch):
    """Two versions of a function that a user edits between two calls."""
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for value in (1.0, 2.0):
        module = f"rewards_{value:.0f}"
        text = f"def mine(prompts, **columns):\n    return [{value}] * len(prompts)\n"
        (tmp_path / f"{module}.py").write_text(text)
        versions.append(importlib.import_module(module).mine)
    start, config = copy.deepcopy(ar.model), settings(tmp_path / "run", ar, max_steps=1)
    train_grpo(ar, versions[:1], ROWS, config)
    ar.model = start
    with pytest.raises(FileExistsError, match=r"another run.*rewards.*mine"):
        train_grpo(ar, versions[1:], ROWS, config)


def test_a_folder_of_another_run_is_refused(ar, tmp_path):
    config = settings(tmp_path / "run", ar, max_steps=1)
    start = copy.deepcopy(ar.model)
    train_grpo(ar, [length], ROWS, config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for rewards, rows, changes, name in (
        ([length], ROWS, {"beta": 0.5}, "beta"),
        ([length], ROWS, {"seed": 1}, "seed"),
        ([parity], ROWS, {}, "rewards"),
        ([length], ROWS[:2], {}, "rows"),
    ):
        ar.model = copy.deepcopy(start)
        with pytest.raises(FileExistsError, match=rf"another run.*{name}"):
            train_grpo(ar, rewards, rows, config.replace(**changes))
    with pytest.raises(FileExistsError, match="policy"):
        with torch.no_grad():
            ar.model.lm_head.weight[7, 7] += 1
        train_grpo(ar, [length], ROWS, config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("rewards", "rows", "message"),
    [
        ([], ROWS, "no reward"),
        ([length], [], "no training rows"),
        ([length, length], ROWS, "share a name"),
        ([length], [{"prompt": "1" * 600}], "context of 512"),
    ],
)
def test_bad_input_is_refused_before_any_work(policy, tmp_path, rewards, rows, message):
    with pytest.raises(ValueError, match=message):
        train_grpo(policy, rewards, rows, settings(tmp_path / "run", policy))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", [False, True])
def test_a_toy_reward_rises(policy, tmp_path, lora):
    """The share of odd token ids, about a half at the start."""
    if lora:
        add_lora(policy, r=8, lora_alpha=64)
    config = settings(
        tmp_path / "run",
        policy,
        max_steps=26,
        max_completion_length=8,
        steps=4 if policy.denoises else None,
        beta=0.0,
        learning_rate=2e-2,
        max_grad_norm=1.0,
    )
    rewards = [row["reward"] for row in rows_of(train_grpo(policy, [parity], ROWS, config))[:-1]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.2


def test_a_users_own_prompts_and_reward_take_ten_lines(mdm, tmp_path):
    lines = [
        '{"prompt": "Name a fruit.", "wanted": "a"}',
        '{"prompt": "And a tree?", "wanted": "e"}',
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    seen = set()

    # README
    rows = load_rows(tmp_path / "mine.jsonl")

    def has_letter(prompts, completions, wanted, **columns):
        seen.update(zip(prompts, wanted, strict=True))
        return [float(w in text) for w, text in zip(wanted, completions, strict=True)]

    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        max_completion_length=16,
        sampler={"steps": 8},
    )
    folder = train_grpo(mdm, [has_letter], rows, config)
    # until here
    assert seen == {("Name a fruit.", "a"), ("And a tree?", "e")}
    assert 0 <= rows_of(folder)[0]["rewards/has_letter/mean"] <= 1


# -- numbers that are not --------------------------------------------------------------------------


def test_sampling_from_weights_that_are_not_finite_ends_the_run_at_once(policy, tmp_path):
    with torch.no_grad():
        policy.model.lm_head.weight[100] = math.nan
    with pytest.raises(FloatingPointError, match=r"positions have logits that are nan"):
        train_grpo(policy, [length], ROWS, settings(tmp_path / "run", policy))


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(policy, tmp_path, monkeypatch):
    real = grpo.estimator

    def overflowing(name, policy):
        score = real(name, policy)
        return replace(score, function=lambda *arguments: score(*arguments) * math.inf)

    monkeypatch.setattr(grpo, "estimator", overflowing)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    config = settings(tmp_path / "run", policy, max_steps=9)
    with pytest.raises(FloatingPointError, match=r"5 updates in a row.*step 4 on prompts"):
        train_grpo(policy, [length], ROWS, config)
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert [row["skipped_updates"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_finite_update_starts_the_count_again(ar, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def sometimes(parameters, max_norm):
        calls.append(clip(parameters, max_norm))
        return calls[-1] if len(calls) == 5 else torch.tensor(NAN)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", sometimes)
    train_grpo(ar, [length], ROWS, settings(tmp_path / "run", ar, max_steps=9))
    skipped = [row["skipped_updates"] for row in rows_of(tmp_path / "run")[:-1]]
    assert skipped == [1, 2, 3, 4, 0, 1, 2, 3, 4]


# -- several processes -----------------------------------------------------------------------------

TWO_PROCESSES = """
import hashlib, json, sys
from mdmrl import GRPOConfig, load_policy, train_grpo

def short(prompts, completions, **columns):
    return [-float(len(t)) if "1" not in p else None for p, t in zip(prompts, completions)]

folder, output, changes = sys.argv[1:]
policy = load_policy(folder)
rows = [{"prompt": f"What is {i}?"} for i in range(8)]
config = GRPOConfig(
    output_dir=output, max_steps=2, sampler={"steps": 2}, max_completion_length=6,
    num_generations=2, per_device_train_batch_size=4, save_steps=1,
    **json.loads(changes),
)
train_grpo(policy, [short], rows, config)
weights = b"".join(p.detach().numpy().tobytes() for p in policy.model.parameters())
# In one write, which the other process does not cut in two.
sys.stdout.write(f"weights {hashlib.sha256(weights).hexdigest()}\\n")
"""


# All that a process tells the others of, or hears from them.
TOLD = {"scale_rewards": "batch", "kl_in_reward": True, "kl_estimator": "k1", "num_iterations": 2}
TOLD |= {"mask_truncated_completions": True, "log_gradients": True}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, TOLD], ids=["defaults", "options"])
def test_two_processes_share_the_prompts_and_keep_the_same_weights(mdm, tmp_path, changes):
    mdm.save_pretrained(tmp_path / "policy")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    # What `accelerate launch` uses for several GPUs; its own CPU launcher wants mpirun.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, *(tmp_path / n for n in ("script.py", "policy", "run")), json.dumps(changes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    digests = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(digests) == 2 and len(set(digests)) == 1
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
