"""The objectives against scalar loops, enumeration and the published formulas."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import nested

import mdmrl.rl.grpo as grpo
from mdmrl.policies import add_lora
from mdmrl.rl.config import LOSS_TYPES, RATIO_FREE, GRPOConfig
from mdmrl.rl.grpo import grpo_loss, train_grpo, update
from mdmrl.rl.logprobs import Noise, draw_noise, estimator
from mdmrl.rl.objectives import charge, divisor, sandwiched, wd1_weights
from mdmrl.rl.oracle import Oracle, all_texts, denoiser_of
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.rl.scoring import charged
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig
from mdmrl.zoo.toy import toy_policy

ROWS = [{"prompt": "abca"}, {"prompt": "bc"}]
NAN = math.nan
RATIOS = [
    (loss_type, level, clip)
    for loss_type in ("grpo", "dr_grpo", "dapo")
    for level in ("token", "sequence")
    for clip in ("one_sided", "two_sided", "cispo")
]
OBJECTIVES = RATIOS + [(name, "token", "one_sided") for name in RATIO_FREE]


def even(prompts, completions, completion_ids, **columns):
    """The share of "a" and "c"."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def settings(**changes):
    small = {"max_steps": 3, "max_completion_length": 8, "steps": 4, "learning_rate": 1e-3}
    small |= {"logp_estimator": "one_step", "log_gradients": True}
    return GRPOConfig.thesis(**nested(small | changes))


def toy(family="mdm", letters="abc"):
    """A random policy, a little away from its reference."""
    policy = toy_policy(letters, family, 2, 2)
    policy.sync_reference()
    generator = generator_for(0, "move")
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return policy


def a_rollout(policy, config, reward=even):
    """Two groups of six, of different lengths."""
    rollout, *_ = collect(
        policy, ROWS, [reward], 6, config.sampler_for(policy), generator_for(0, "rollout")
    )
    assert rollout.completion_mask.sum(1).unique().numel() > 2
    return rollout


def noise_of(rollout, score):
    return draw_noise(rollout, 0.0, generator_for(0, "noise"), score.samples, score.shared)


def enumerated(policy, texts):
    """All texts in one rollout. Where `counted` are probabilities, sums are expectations."""
    prompt = policy.encode(["ab"]).input_ids.expand(len(texts), -1)
    config = SamplerConfig(temperature=1.0)
    return Rollout(prompt, prompt >= 0, texts, texts >= 0, torch.zeros(len(texts)), None, config)


# -- the loss --------------------------------------------------------------------------------------


def random_case(per_token, seed=3):
    """Log-probabilities of new, old and reference policy, in two groups of three."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 8) if per_token else (6,)
    size = 2 if per_token else 10
    logp, old, ref = (-size * torch.rand(shape, generator=generator).double() for _ in range(3))
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 1, 6, 2])[:, None]
    counted = torch.tensor([True, True, False, True, True, True])
    advantages = torch.tensor([1.1, -0.7, 0.0, -1.3, 0.4, 0.9]).double()
    ids = torch.zeros(6, 8, dtype=torch.long)
    return logp, old, ref, Rollout(ids, mask, ids, mask, advantages, counted, SamplerConfig())


KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) + d - 1}


def scalar_loss(logp, old, ref, rollout, config, now=None):
    """`now`: what `cispo` takes its weights at."""
    eps, surrogate, kl = config.epsilon, 0.0, 0.0
    lengths = rollout.completion_mask.sum(1).tolist()
    chosen = [i for i in range(6) if rollout.counted[i]]
    tokens = sum(lengths[i] for i in chosen)
    for i in chosen:
        a, n = rollout.advantages[i].item(), lengths[i]
        x, o, r, w = (
            [v[i] / n] * n if isinstance(v[i], float) else v[i][:n]
            for v in (logp, old, ref, now or logp)
        )
        share = {
            "grpo": 1 / n / len(chosen),
            "dr_grpo": 1 / config.max_completion_length / len(chosen),
            "wd1": 1 / config.max_completion_length / len(chosen),
            "dapo": 1 / tokens,
            "spg": 1 / tokens,
        }[config.loss_type]
        for k in range(n):
            change = w[k] - o[k] if config.clip == "cispo" else x[k] - o[k]
            if config.importance_sampling_level == "sequence":
                source = w if config.clip == "cispo" else x
                change = sum(source[j] - o[j] for j in range(n)) / n
            ratio = math.exp(change)
            inside = min(max(ratio, 1 - eps), 1 + eps)
            gain = {
                "one_sided": min(ratio * a, inside * a),
                "two_sided": inside * a,
                "cispo": inside * a * x[k],
            }[config.clip]
            surrogate -= share * (a * x[k] if config.loss_type in RATIO_FREE else gain)
            kl += share * config.beta * KL[config.kl_estimator](x[k] - r[k])
    return surrogate, kl


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("loss_type", "level", "clip"), OBJECTIVES)
def test_the_loss_and_its_gradient_equal_a_scalar_loop(loss_type, level, clip, per_token):
    logp, old, ref, rollout = random_case(per_token)
    free = {} if loss_type in RATIO_FREE else {"epsilon": 0.15}
    config = settings(
        loss_type=loss_type,
        importance_sampling_level=level,
        clip=clip,
        beta=0.3,
        kl_estimator="k2" if per_token else "k3",
        max_completion_length=11,
        **free,
    )
    logp.requires_grad_()
    surrogate, kl, seen = grpo_loss(logp, old, ref, rollout, config)
    whole = divisor(rollout, config)
    (slope,) = torch.autograd.grad((surrogate + kl) / whole, logp)
    values = logp.tolist(), old.tolist(), ref.tolist()

    def loss(where=None, step=0.0):
        moved = logp.detach().clone()
        if where is not None:
            moved[where] += step
        return scalar_loss(moved.tolist(), *values[1:], rollout, config, values[0])

    assert ((surrogate / whole).item(), (kl / whole).item()) == pytest.approx(loss())
    for where in torch.cartesian_prod(*map(torch.arange, logp.shape)).view(-1, logp.ndim):
        where = tuple(where.tolist())
        expected = (sum(loss(where, 1e-6)) - sum(loss(where, -1e-6))) / 2e-6
        assert slope[where].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (loss_type in RATIO_FREE) == ("ratio" not in seen)
    if "ratio" in seen:
        assert 0 < seen["clipped"][rollout.counted].float().mean() < 1
        assert seen["ratio"].shape[1] == (8 if per_token and level == "token" else 1)


def test_with_the_kl_in_the_reward_the_loss_has_none():
    logp, old, ref, rollout = random_case(True)
    config = settings(beta=0.3, kl_in_reward=True)
    surrogate, kl, seen = grpo_loss(logp, old, ref, rollout, config)
    without, *_ = grpo_loss(logp, old, ref, rollout, settings(beta=0.0))
    assert (surrogate.item(), kl.item()) == (without.item(), 0)
    assert seen["kl"].max() > 0


# -- wd1 -------------------------------------------------------------------------------------------

GROUPS = [[1.0, -2.0, 0.5, 0.5], [0.0] * 4, [3.0, NAN, -3.0, 0.0], [NAN] * 4]


def scalar_weights(group, psi):
    counted = [a for a in group if not math.isnan(a)]
    up, down = (sum(math.exp(s * psi * a) for a in counted) for s in (1, -1))
    return [
        0.0
        if math.isnan(a)
        else len(counted) * (math.exp(psi * a) / up - math.exp(-psi * a) / down)
        for a in group
    ]


@pytest.mark.parametrize("psi", [1.0, 0.2])
def test_wd1_weights_equal_a_scalar_loop_and_sum_to_zero(psi):
    flat = torch.tensor(GROUPS).flatten()
    ids = torch.zeros(16, 1, dtype=torch.long)
    mask = ids == 0
    rollout = Rollout(ids, mask, ids, mask, flat.nan_to_num(0), ~flat.isnan(), SamplerConfig())
    config = settings(
        loss_type="wd1", psi=psi, num_generations=4, per_device_train_batch_size=16, beta=0
    )
    found = wd1_weights(rollout, config)
    expected = [weight for group in GROUPS for weight in scalar_weights(group, psi)]
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(found.view(4, 4).sum(1), torch.zeros(4), atol=1e-6, rtol=0)


# -- SPG -------------------------------------------------------------------------------------------


def every_draw(rollout, n):
    """Noise whose samples are all sizes and orders that blocks of `n` can have, each once."""
    batch, length = rollout.completion_ids.shape
    draws = itertools.product(range(n + 1), itertools.permutations(range(n)))
    times, orders = zip(*draws, strict=True)
    time = (torch.tensor(times) + 0.5) / (n + 1)
    order = (torch.tensor(orders) + 0.5) / n
    shape = (batch, len(times), length)
    return Noise(
        torch.zeros_like(rollout.prompt_mask),
        time[None, :, None].expand(shape),
        order.repeat(1, length // n)[None].expand(shape),
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["mdm", "bd"])
def test_spg_scores_from_below_what_was_good_and_from_above_what_was_bad(family):
    policy, config = toy(family), settings(loss_type="spg", logp_estimator="elbo", mix_weight=1)
    rollout = enumerated(policy, all_texts(policy, 4)[::40])
    good = torch.arange(len(rollout)) % 2 == 0
    rollout.advantages = torch.where(good, 1.0, -1.0)
    oracle = Oracle(denoiser_of(policy, "ab", 4), rollout.completion_ids, 4, policy.block_length)
    score = sandwiched(estimator("complementary", policy), config)
    found = score(policy, rollout, every_draw(rollout, oracle.n)).double()
    expected = torch.where(good, oracle.elbo(), oracle.upper_bound())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    exact = oracle.law("random", oracle.n)
    assert (found < exact)[good].all()
    assert (found > exact)[~good].all()


@torch.no_grad()
@pytest.mark.parametrize(("weight", "b"), [(1, None), (0.5, None), (0.3, 1.5), (0, None)])
def test_spg_mixes_the_two_bounds_where_advantages_are_negative(weight, b):
    policy = toy()
    config = settings(loss_type="spg", logp_estimator="quadrature", mix_weight=weight, eubo_beta=b)
    rollout = a_rollout(policy, config)
    lower = estimator("quadrature", policy)
    upper = estimator("upper_bound-3" + (f"-b{b}" if b else ""), policy)
    noise = noise_of(rollout, lower)
    below, above = lower(policy, rollout, noise), upper(policy, rollout, noise)
    found = sandwiched(lower, config)(policy, rollout, noise)
    for i in range(12):
        w = weight if rollout.advantages[i] < 0 else 0
        assert found[i].item() == pytest.approx(w * above[i].item() + (1 - w) * below[i].item())
    kept = rollout.advantages < 0
    assert kept.any() and not kept.all()


def test_spg_takes_a_lower_bound_alone(ar, mdm, tmp_path):
    for policy, name in ((mdm, "one_step"), (mdm, "coupled"), (ar, "exact")):
        config = settings(
            loss_type="spg", logp_estimator=name, output_dir=str(tmp_path / "run"), beta=0
        )
        with pytest.raises(ValueError, match=rf"{name}.*lower bound.*'complementary'"):
            train_grpo(policy, [even], ROWS, config)
    assert not (tmp_path / "run").exists()


# -- one update ------------------------------------------------------------------------------------


def scored(policy, rollout, config):
    score = estimator(config.logp_estimator, policy)
    score = sandwiched(score, config) if config.loss_type == "spg" else score
    if config.loss_type == "wd1":
        rollout = replace(rollout, advantages=wd1_weights(rollout, config))
    return score, rollout, noise_of(rollout, score)


def updated(policy, score, rollout, noise, config, old=None):
    parameters = policy.trainable_parameters()
    found = update(policy, rollout, score, noise, old, parameters, config)
    return found, {n: p.grad.clone() for n, p in parameters.items()}


def close(found, expected):
    for name, value in expected.items():
        size = value.abs().max().item()
        torch.testing.assert_close(found[name], value, atol=1e-4 * size, rtol=1e-3, msg=name)


@pytest.mark.parametrize("loss_type", RATIO_FREE)
def test_the_gradient_is_that_of_the_published_loss(loss_type):
    """-1/L sum_i (w+_i - w-_i) log pi(o_i), the mean over groups; -sum_i A_i B_i / sum_i |o_i|."""
    policy = toy()
    config = settings(loss_type=loss_type, logp_estimator="complementary-2", beta=0)
    rollout = a_rollout(policy, config)
    lower, upper = (estimator(f"{n}-2", policy) for n in ("complementary", "upper_bound"))
    noise = noise_of(rollout, lower)
    _, found = updated(policy, *scored(policy, rollout, config), config)
    below, above = (e(policy, rollout, noise) for e in (lower, upper))
    a = rollout.advantages
    if loss_type == "wd1":
        groups = zip(a.view(2, 6), below.view(2, 6), strict=True)
        loss = -sum(((g.softmax(0) - (-g).softmax(0)) * x).sum() for g, x in groups) / 2 / 8
    else:
        value = torch.where(a < 0, (below + above) / 2, below)
        loss = -(a * value).sum() / rollout.completion_mask.sum()
    policy.model.zero_grad()
    loss.backward()
    close(found, {n: p.grad for n, p in policy.trainable_parameters().items()})


@pytest.mark.parametrize(
    ("loss_type", "level", "clip", "name"),
    [
        ("dr_grpo", "token", "two_sided", "one_step"),
        ("dapo", "sequence", "one_sided", "one_step"),
        ("dapo", "token", "cispo", "elbo-2"),
        ("wd1", "token", "one_sided", "one_step"),
        ("spg", "token", "one_sided", "complementary"),
    ],
)
def test_micro_batches_give_the_gradient_of_the_whole(loss_type, level, clip, name):
    def reward(prompts, completions, completion_ids, **columns):
        return [None, None, *even(prompts, completions, completion_ids)[2:]]

    policy = toy()
    changes = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "clip": clip,
        "logp_estimator": name,
        "kl_estimator": "k2",
    }
    config = settings(**changes)
    score, rollout, noise = scored(policy, a_rollout(policy, config, reward), config)
    with torch.no_grad():
        old = score(policy, rollout, noise) - 0.05
    whole, expected = updated(policy, score, rollout, noise, config, old)
    config = settings(per_device_train_batch_size=4, gradient_accumulation_steps=3, **changes)
    parts, found = updated(policy, score, rollout, noise, config, old)
    assert whole["grad_norm/kl"] > 0 < whole["grad_norm/surrogate"]
    for metric, value in whole.items():
        assert parts[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
    close(found, expected)


# -- the KL ----------------------------------------------------------------------------------------


def gradient_of(value, policy):
    parameters = [*policy.trainable_parameters().values()]
    slopes = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([s.flatten() for s in slopes if s is not None]).double()


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k3_ratio"])
def test_the_expected_gradient_of_each_kl_form_in_closed_form(name):
    """Tokens drawn apart, of four a position: the KL of texts is the sum of that of tokens."""
    policy = toy(letters="ab")
    rollout = enumerated(policy, torch.cartesian_prod(*[torch.arange(4)] * 3))
    score = estimator("one_step", policy)
    noise = noise_of(rollout, score)
    logp = score(policy, rollout, noise)
    with policy.reference():
        ref = score(policy, rollout, noise)
    p, q = logp.sum(1).exp(), ref.sum(1).exp()
    assert (p.sum().item(), q.sum().item()) == (pytest.approx(1, abs=1e-5),) * 2
    forward, backward = (p * (logp - ref).sum(1)).sum(), (q * (ref - logp).sum(1)).sum()
    config = settings(
        loss_type="dr_grpo", max_completion_length=3, steps=1, kl_estimator=name, beta=0.7
    )
    rollout.counted = p.detach()
    _, kl, _ = grpo_loss(logp, logp.detach(), ref, rollout, config)
    target = {"k1": 0 * forward, "k2": forward, "k3": backward, "k3_ratio": forward}[name]
    expected = 0.7 * gradient_of(target, policy)
    close = 1e-4 * gradient_of(forward, policy).norm().item()
    torch.testing.assert_close(gradient_of(kl, policy), expected, atol=close, rtol=0)
    assert (gradient_of(forward, policy) - gradient_of(backward, policy)).norm() > 100 * close


def test_with_the_ratio_k3_has_the_gradient_of_the_kl_wherever_samples_come_from():
    """One token of seven, drawn from an old policy that is neither the new one nor the reference;
    k3 without the ratio has another gradient there."""
    generator = torch.Generator().manual_seed(1)
    new, ref, old = (torch.randn(3, 7, dtype=torch.float64, generator=generator)).log_softmax(-1)
    logits = new.clone().requires_grad_()
    logp = logits.log_softmax(0)
    ids, one = torch.arange(7)[:, None], torch.ones(7, 1, dtype=torch.bool)
    sampler = SamplerConfig(max_new_tokens=1, temperature=1.0)
    rollout = Rollout(ids, one, ids, one, torch.zeros(7).double(), old.exp(), sampler)
    target = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    found = {}
    for name in ("k3", "k3_ratio"):
        config = settings(kl_estimator=name, beta=0.7, max_completion_length=1, steps=1)
        columns = (x[:, None] for x in (logp, old, ref))
        _, kl, _ = grpo_loss(*columns, rollout, config)
        found[name] = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    torch.testing.assert_close(found["k3_ratio"], 0.7 * target)
    assert (found["k3"] - 0.7 * target).norm() > 0.1 * target.norm()


def test_of_whole_texts_k2_in_the_loss_and_k1_in_the_reward_have_the_gradient_of_the_kl():
    """The left-to-right sampler's law, whose tokens depend on each other."""
    policy = toy(letters="ab")
    texts = all_texts(policy, 3)
    rollout = enumerated(policy, texts)

    def law():
        return Oracle(denoiser_of(policy, "ab", 3), texts, 3).law("sequential", 3)

    logp = law()
    with policy.reference():
        ref = law()
    p = logp.exp()
    assert p.sum().item() == pytest.approx(1)
    target = gradient_of((p * (logp - ref)).sum(), policy)
    rollout.counted = p.detach()
    config = settings(
        loss_type="dr_grpo", max_completion_length=3, steps=1, kl_estimator="k2", beta=0.7
    )
    _, kl, _ = grpo_loss(logp, logp.detach(), ref, rollout, config)
    # d is divided by the length of 3, and the sum over 3 tokens makes up for one of its two.
    torch.testing.assert_close(3 * gradient_of(kl, policy), 0.7 * target, atol=1e-5, rtol=1e-3)
    config = settings(kl_in_reward=True, kl_estimator="k1", beta=0.7)
    cost = charge(logp.detach(), ref, rollout, config)
    reinforced = gradient_of((p.detach() * cost * logp).sum(), policy)
    torch.testing.assert_close(reinforced, 0.7 * target, atol=1e-5, rtol=1e-3)
    assert target.norm() > 1e-2


@pytest.mark.parametrize("name", ["one_step", "elbo-2-unshared"])
@pytest.mark.parametrize("form", ["k1", "k2", "k3"])
def test_a_charged_reward_equals_a_scalar_loop(name, form):
    def reward(prompts, completions, completion_ids, **columns):
        return [None, *even(prompts, completions, completion_ids)[1:]]

    policy = toy()
    config = settings(logp_estimator=name, kl_in_reward=True, kl_estimator=form, beta=0.2)
    rollout, score = a_rollout(policy, config, reward), estimator(name, policy)
    noise = noise_of(rollout, score)
    with torch.no_grad():
        logp = score(policy, rollout, noise)
        with policy.reference():
            ref = score(policy, rollout, noise.reference or noise)
    found, mean = charged(policy, rollout, score, noise, config)
    costs = []
    for i in range(12):
        n = int(rollout.completion_mask[i].sum())
        d = (logp - ref)[i].tolist()
        tokens = [d / n] * n if isinstance(d, float) else d[:n]
        costs.append(0.2 * sum(map(KL[form], tokens)))
    assert mean == pytest.approx(sum(costs) / 12, rel=1e-3)
    for first in (0, 6):
        left = [rollout.rewards[i].item() - costs[i] for i in range(max(first, 1), first + 6)]
        centre = sum(left) / len(left)
        std = math.sqrt(sum((r - centre) ** 2 for r in left) / (len(left) - 1))
        expected = [(r - centre) / (std + 1e-4) for r in left]
        advantages = found.advantages[max(first, 1) : first + 6].tolist()
        assert advantages == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found.advantages[0] == 0
    assert not torch.allclose(found.advantages, rollout.advantages, atol=1e-3)


# -- the ratio -------------------------------------------------------------------------------------


def test_dropout_is_found_out(tmp_path):
    policy = toy_policy("abc", "mdm", 2)
    add_lora(policy, r=4, lora_dropout=0.5)
    policy.model.train()
    config = settings(output_dir=str(tmp_path / "run"), learning_rate=1e-2)
    with pytest.raises(RuntimeError, match=r"log-probability of -\d.*old one gives -\d.*dropout"):
        train_grpo(policy, [even], ROWS, config)


@pytest.mark.parametrize(("name", "loss_type"), [("one_step", "grpo"), ("elbo", "spg")])
@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_another_scoring_while_learning_is_found_out(tmp_path, monkeypatch, name, loss_type, shift):
    real = grpo.estimator

    def other(name, policy):
        score = real(name, policy)

        def shifted(policy, rollout, noise):
            size = shift * torch.is_grad_enabled()
            return score(policy, rollout, noise) + size * rollout.completion_mask.sum()

        return replace(score, function=shifted)

    monkeypatch.setattr(grpo, "estimator", other)
    policy = toy_policy("abc", "mdm", 2)
    before = policy.fingerprint()
    config = settings(
        output_dir=str(tmp_path / "run"), logp_estimator=name, loss_type=loss_type, max_steps=1
    )
    if shift == 0:
        train_grpo(policy, [even], ROWS, config)
        return
    with pytest.raises(RuntimeError, match=r"before any update.*a ratio \d.*off 1"):
        train_grpo(policy, [even], ROWS, config)
    assert policy.fingerprint() == before


# -- runs ------------------------------------------------------------------------------------------

LEARNING = [
    {"loss_type": "wd1", "beta": 0.0},
    {"loss_type": "spg", "logp_estimator": "complementary", "beta": 0.0},
    {"importance_sampling_level": "sequence", "clip": "two_sided", "beta": 0.0},
    {"loss_type": "dr_grpo", "clip": "cispo", "beta": 0.0},
    {"loss_type": "dapo", "kl_in_reward": True, "kl_estimator": "k1", "beta": 0.002},
]


@pytest.mark.parametrize("changes", LEARNING, ids=str)
def test_a_toy_reward_rises(changes, tmp_path):
    config = settings(
        output_dir=str(tmp_path / "run"),
        max_steps=14,
        num_iterations=2,
        learning_rate=1e-2,
        per_device_train_batch_size=24,
        **changes,
    )
    folder = train_grpo(toy_policy("abc", "mdm", 2), [even], ROWS[:1], config)
    rows = read_rows(folder / "metrics.jsonl")[:-1]
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.15
    assert all(("ratio/mean" in row) == (config.loss_type not in RATIO_FREE) for row in rows)
    assert all(("kl/charged" in row) == config.kl_in_reward for row in rows)
    assert all(row["loss/kl"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "dr-grpo"}, "did you mean 'dr_grpo'"),
        ({"importance_sampling_level": "tokens"}, "did you mean 'token'"),
        ({"clip": "both"}, "unknown clip 'both'"),
        ({"loss_type": "wd1", "psi": 0}, "psi=0.0: expected a positive"),
        ({"loss_type": "spg", "mix_weight": 1.5}, r"mix_weight=1.5: expected \[0, 1\]"),
        ({"loss_type": "spg", "eubo_beta": 0}, "eubo_beta=0.0: expected a positive"),
        ({"loss_type": "wd1", "clip": "cispo"}, "clip='cispo' would be ignored.*no ratio"),
        ({"loss_type": "spg", "epsilon": 0.2}, "epsilon=0.2 would be ignored.*leave it at 0.1"),
        (
            {"loss_type": "wd1", "importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence' would be ignored",
        ),
        ({"psi": 2}, "psi=2.0 would be ignored: it is for loss_type='wd1'.*'grpo'"),
        ({"loss_type": "wd1", "mix_weight": 1}, "mix_weight=1.0 would be ignored"),
        ({"eubo_beta": 2}, "eubo_beta=2.0 would be ignored"),
        ({"loss_type": "spg", "mix_weight": 0, "eubo_beta": 2}, "with mix_weight=0"),
        ({"kl_in_reward": True, "beta": 0}, "kl_in_reward=True would be ignored: with beta=0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_or_no_difference_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_may_be_asked_for_alone(loss_type):
    assert GRPOConfig(loss_type=loss_type).loss_type == loss_type
