"""Each trainer's gradient is the one that the table of `mdmrl.rl.unified` gives, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import mdmrl.rl.rounds as rounds
from mdmrl.diffusion import mask_tokens, sample_times
from mdmrl.rl import grpo, ppo
from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.episodes import score_episodes
from mdmrl.rl.gradients import Gradients
from mdmrl.rl.logprobs import draw_noise, estimator
from mdmrl.rl.preference import DPOConfig, encode_preferences, losses, rollout_of
from mdmrl.rl.rejection import RFTConfig, ids_of, train_rft
from mdmrl.rl.rollout import collect
from mdmrl.rl.unified import METHODS, Scored
from mdmrl.runs import generator_for
from mdmrl.training import sft
from mdmrl.training.config import SFTConfig
from mdmrl.training.loop import Optimizer
from mdmrl.training.sft import train_sft
from mdmrl.training.supervised import collate, encode_pairs
from mdmrl.zoo.toy import toy_policy

LENGTH = 4
ROWS = [{"prompt": "ab"}, {"prompt": "c"}, {"prompt": "bca"}]
SOLUTIONS = [row | {"completion": text} for row, text in zip(ROWS, ("ca", "abc", "b"), strict=True)]
SMALL = {"max_steps": 1, "max_completion_length": LENGTH, "per_device_train_batch_size": 12}


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normed(self, x):
    """Transformers' RMSNorm without its detour through float32."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture(params=["ar", "mdm"])
def toy(request, monkeypatch):
    """A toy policy in float64 throughout."""
    monkeypatch.setattr(Qwen2RMSNorm, "forward", normed)
    policy = toy_policy("abc", request.param)
    policy.model.double()
    policy.head = lambda hidden: policy.model.get_output_embeddings()(hidden)
    return policy


def moved(policy, by, seed=1):
    """Move every weight a little."""
    generator = generator_for(seed, "move")
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=generator))


def some(prompts, completions, **columns):
    """Some texts are right, some are not."""
    return [float(text.count("a") % 2 == 0 and "b" in text) for text in completions]


def settings(kind, policy, **changes):
    sampler = {"sampler": {"steps": LENGTH}} if policy.denoises else {}
    return kind(**SMALL | sampler | changes)


def gradient(policy, objective):
    return torch.autograd.grad(objective, [*policy.trainable_parameters().values()])


def assert_climbs(policy, slopes, method, scored, logp):
    """What a trainer descends is what the method climbs, the other way."""
    expected = gradient(policy, METHODS[method].objective(scored, logp))
    size = math.sqrt(sum(e.square().sum().item() for e in expected))
    off = sum((s + e).square().sum().item() for s, e in zip(slopes, expected, strict=True))
    assert size > 1e-4
    assert math.sqrt(off) < 1e-10 * size


def learnt_logps(policy, texts, config):
    """log pi of tokens by the family's supervised loss, token by token, and what counts, (B, L)."""
    batch = collate(texts, LENGTH, policy.tokenizer.eos_token_id)
    width = batch.input_ids.shape[1] - LENGTH
    ids = batch.input_ids
    if not policy.denoises:
        logps = policy.logits(ids, batch.attention_mask).log_softmax(-1)
        logps = logps.gather(-1, ids[..., None])[..., 0]  # canvas positions: no shift
        return logps[:, width:], batch.written[:, width:]
    noise = generator_for(config.seed, "noise", 0, 0)
    t, weight = sample_times(len(ids), noise)
    xt, masked = mask_tokens(ids, t, batch.completion, policy.mask_token_id, noise)
    logps = policy.logits(xt, batch.attention_mask).log_softmax(-1)
    logps = logps.gather(-1, ids[..., None])[..., 0] * masked * weight[:, None]
    return logps[:, width:], batch.completion[:, width:]


@pytest.fixture
def caught(monkeypatch):
    """Gradients of the optimizer's step, which is not taken, and the rollouts that were drawn."""
    found = SimpleNamespace(slopes=None, rollouts=[])

    def step(self, loss, batch):
        (group,) = self.adamw.param_groups
        found.slopes = [p.grad.clone() for p in group["params"]]
        return {"grad_norm": 0.0, "skipped_updates": 0}

    def collecting(*arguments, **options):
        result = collect(*arguments, **options)
        found.rollouts.append(result[0])
        return result

    monkeypatch.setattr(Optimizer, "step", step)
    monkeypatch.setattr(rounds, "collect", collecting)
    monkeypatch.setattr("mdmrl.rl.rejection.collect", collecting)
    return found


def test_sft(toy, tmp_path, caught):
    config = settings(SFTConfig, toy, output_dir=tmp_path / "run", per_device_train_batch_size=3)
    train_sft(toy, SOLUTIONS, config)
    drawn = sft.rows_of_step(encode_pairs(toy, SOLUTIONS, LENGTH), 3, 0, 0, 1, config.seed)
    logp, mask = learnt_logps(toy, drawn, config)
    assert_climbs(toy, caught.slopes, "SFT", Scored(mask, config), logp)


@pytest.mark.parametrize("online", [False, True])
def test_rft(toy, tmp_path, caught, online):
    """Offline the batch is of right completions alone, in the order in which they are learnt."""
    config = settings(RFTConfig, toy, output_dir=tmp_path / "run", num_generations=4, online=online)
    train_rft(toy, [some], ROWS, config)
    (rollout,) = caught.rollouts
    right = rollout.rewards >= 1
    assert 0 < right.sum() < len(right)
    kept = ids_of(rollout.select(right))
    if not online:
        kept = list(dict.fromkeys(kept))
        kept = sft.rows_of_step(kept, config.batch, 0, 0, 1, config.seed)
        right = torch.arange(len(kept) + 1) < len(kept)  # and one that is wrong
    inside, counts = learnt_logps(toy, kept, config)
    logp, mask = torch.zeros(len(right), LENGTH), torch.ones(len(right), LENGTH, dtype=torch.bool)
    logp, mask = logp.index_put((right,), inside), mask.index_put((right,), counts)
    scored = Scored(mask, config, rewards=right.double())
    method = "Online RFT" if online else "RFT"
    assert_climbs(toy, caught.slopes, method, scored, logp)


def by_token(logp, mask):
    """Of a text as a whole every token has an equal part."""
    return logp if logp.ndim == 2 else (logp / mask.sum(1))[:, None].expand(mask.shape)


@pytest.mark.parametrize("unshared", [False, True])
def test_dpo(toy, unshared):
    toy.sync_reference()
    moved(toy, 0.02)
    named = ("elbo-2-unshared" if unshared else "elbo-2") if toy.denoises else "exact"
    config = settings(DPOConfig, toy, beta=0.7, logp_estimator=named)
    config = config.replace(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    rows = [{"prompt": "ab", "chosen": "ca", "rejected": "abc"}]
    rows += [{"prompt": "c", "chosen": "bb", "rejected": "a"}]
    pairs, scorer = encode_preferences(toy, rows, LENGTH), estimator(named, toy)
    parts = list(losses(toy, pairs, scorer, generator_for(0, "noise"), config))
    assert len(parts) == 2
    slopes = gradient(toy, sum(part["loss"].sum() for part in parts) / len(pairs))

    rollout = rollout_of(toy, [text for pair in pairs for text in pair], LENGTH)
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"), scorer.samples, scorer.shared)
    mask = rollout.completion_mask
    logp = by_token(scorer(toy, rollout, noise), mask)
    with toy.reference():
        ref = by_token(scorer(toy, rollout, noise.reference or noise), mask)
    scored = Scored(mask, config, d=(logp - ref).detach())
    assert_climbs(toy, slopes, "DPO", scored, logp)
    margin = sum(part["rewards/margins"] for part in parts[:1])
    d = torch.where(mask, logp - ref, 0.0).sum(1)
    assert margin.item() == pytest.approx(0.7 * (d[0] - d[1]).item())


def drawn_rollout(policy, config, record):
    generator = generator_for(0, "rollout")
    sampler = config.sampler_for(policy)
    return collect(policy, ROWS, [some], 4, sampler, generator, record)[0]


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3", "k3_ratio"])
@pytest.mark.parametrize("named", ["path", "elbo-2"])
def test_grpo(toy, named, kl_estimator):
    """At a later inner step, where ratios are off 1 and some of them clipped."""
    if named == "path":
        named = "trajectory" if toy.denoises else "exact"
    elif not toy.denoises:
        pytest.skip("an autoregressive policy has log pi itself")
    own = {"logp_estimator": named, "beta": 0.3, "num_generations": 4}
    config = settings(GRPOConfig, toy, kl_estimator=kl_estimator, epsilon=0.05, **own)
    scorer = estimator(named, toy)
    rollout = drawn_rollout(toy, config, scorer.records)
    rollout = rollout.whole() if scorer.records else rollout
    noise, mask = (
        draw_noise(rollout, 0.0, generator_for(0, "noise"), scorer.samples),
        rollout.completion_mask,
    )
    old = scorer(toy, rollout, noise).detach()
    toy.sync_reference()
    moved(toy, 0.03)
    found = grpo.update(toy, rollout, scorer, noise, old, toy.trainable_parameters(), config)
    assert 0 < found["clip_ratio"] < 1
    slopes = [p.grad for p in toy.trainable_parameters().values()]
    logp = by_token(scorer(toy, rollout, noise), mask)
    with toy.reference():
        ref = by_token(scorer(toy, rollout, noise), mask)
    change, d = ((logp - by_token(other, mask)).detach() for other in (old, ref))
    scored = Scored(mask, config, advantages=rollout.advantages.double(), change=change, d=d)
    assert_climbs(toy, slopes, "GRPO", scored, logp)


def test_ppo(toy):
    """Its loss on tokens, of a policy that denoises by its update; an advantage for each step."""
    config = settings(PPOConfig, toy, beta=0.0, epsilon=0.05, num_generations=4)
    sampler = (
        config.sampler_for(toy) if toy.denoises else settings(GRPOConfig, toy).sampler_for(toy)
    )
    rollout, *_ = collect(
        toy, ROWS, [some], 4, sampler, generator_for(0, "rollout"), record=toy.denoises
    )
    rollout = rollout.whole() if toy.denoises else rollout
    mask, scorer = rollout.completion_mask, estimator(None, toy)
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"))
    logp_old = scorer(toy, rollout, noise).detach()
    by_step = torch.randn(mask.shape, generator=generator_for(0, "advantages"))
    parameters = toy.trainable_parameters()
    if toy.denoises:
        advantages = by_step.gather(1, rollout.revealed_at)
        old = score_episodes(toy, rollout, 12, reference=False)
        moved(toy, 0.03)
        ppo.update(toy, old, by_step, 0.0, parameters, config)
        logp = scorer(toy, rollout, noise)
    else:
        advantages = by_step
        moved(toy, 0.03)
        logp = scorer(toy, rollout, noise)
        tokens = (x[mask] for x in (logp, logp_old, torch.zeros_like(logp), advantages, mask))
        gradients = Gradients(toy, parameters, apart=False)
        surrogate, charged, _ = ppo.ppo_loss(*tokens, 0.0, config)
        gradients.add(surrogate / len(mask), charged)
        logp = scorer(toy, rollout, noise)
    change = (logp - logp_old).detach()
    assert ((change.exp() - 1).abs() > config.epsilon)[mask].any()
    scored = Scored(mask, config, advantages=advantages, change=change)
    slopes = [p.grad for p in parameters.values()]
    assert_climbs(toy, slopes, "PPO", scored, logp)


def test_the_table_says_what_the_six_differ_in():
    assert [*METHODS] == ["SFT", "RFT", "Online RFT", "DPO", "PPO", "GRPO"]
    assert len({(m.data, m.reward, m.formula) for m in METHODS.values()}) == 6
