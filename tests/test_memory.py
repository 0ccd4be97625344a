"""What an update may hold at once, and that holding less changes nothing."""

import copy

import pytest
import torch
from conftest import nested, parity

from mdmrl import GRPOConfig, PPOConfig, SFTConfig, train_grpo, train_ppo, train_sft
from mdmrl.config import InputError
from mdmrl.policies import add_lora, network
from mdmrl.rl.logprobs import draw_noise, estimator
from mdmrl.rl.rollout import collect
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.denoise import sample
from mdmrl.sampling.output import SamplerOutput
from mdmrl.training import data

ROWS = [{"prompt": f"What is {i}?" * (1 + i), "completion": "12" * i} for i in range(4)]


def fresh(policy):
    return type(policy)(copy.deepcopy(policy.model), copy.deepcopy(policy.tokenizer))


def settings(config, folder, **changes):
    small = {"output_dir": str(folder), "max_steps": 2, "max_completion_length": 8}
    small |= {"per_device_train_batch_size": 4, "learning_rate": 3e-3}
    own = {} if config is SFTConfig else {"num_generations": 2}
    return config(**nested(small | own | changes))


# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [("ar", "exact"), ("mdm", "complementary")])
def test_logits_are_held_in_parts_and_score_and_slope_are_the_same(
    family, name, request, monkeypatch
):
    policy, sizes = request.getfixturevalue(family), []
    sampler = SamplerConfig(max_new_tokens=8, temperature=0.7, stop_at_end=True)
    rollout, *_ = collect(policy, ROWS[:2], [parity], 3, sampler, generator_for(0, "x"))
    scorer = estimator(name, policy)
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"), scorer.samples)
    parameters = [*policy.trainable_parameters().values()]
    head = type(policy).head

    def seen(self, hidden):
        sizes.append(len(hidden) * self.model.config.vocab_size)
        return head(self, hidden)

    def scored():
        sizes.clear()
        values = scorer(policy, rollout, noise)
        slopes = torch.autograd.grad(values.square().sum(), parameters, allow_unused=True)
        return values.detach(), [slope for slope in slopes if slope is not None], max(sizes)

    monkeypatch.setattr(type(policy), "head", seen)
    values, slopes, most = scored()
    limit = 5 * policy.model.config.vocab_size
    assert most > limit
    monkeypatch.setattr(network, "LOGITS_AT_ONCE", limit)
    in_parts, others, most = scored()
    assert most == limit
    torch.testing.assert_close(in_parts, values, atol=1e-5, rtol=1e-5)
    for one, other in zip(others, slopes, strict=True):  # to what float32 has of its largest number
        torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().item(), rtol=1e-3)


def test_a_cold_start_in_parts_has_the_same_loss(any_policy, monkeypatch):
    from mdmrl.training.sft import held_out_loss
    from mdmrl.training.supervised import encode_pairs

    config = SFTConfig(max_completion_length=8)
    pairs = encode_pairs(any_policy, ROWS, 8)
    whole = held_out_loss(any_policy, pairs, config)
    monkeypatch.setattr(network, "LOGITS_AT_ONCE", 3 * any_policy.model.config.vocab_size)
    assert held_out_loss(any_policy, pairs, config) == pytest.approx(whole, rel=1e-5)


# -- layers ----------------------------------------------------------------------------------------

WAYS = {
    "ar-grpo": (train_grpo, GRPOConfig, {"log_gradients": True}),
    "mdm-grpo-lora": (train_grpo, GRPOConfig, {"steps": 2, "num_iterations": 2}),
    "mdm-sft-lora": (train_sft, SFTConfig, {"gradient_accumulation_steps": 2}),  # its dropout is on
    "bd-ppo": (train_ppo, PPOConfig, {"steps": 4, "value_batches": 2, "states_per_forward": 8}),
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_are_made_again_give_the_same_bits(way, shared_policies, tmp_path):
    family, *rest = way.split("-")
    train, config, changes = WAYS[way]
    found = []
    for again in (False, True):
        policy, passes = fresh(shared_policies[family]), []
        if "lora" in rest:
            add_lora(policy, r=2, lora_dropout=0.5)
        layer = policy._transformer.base_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, at=passes: at.append(torch.is_grad_enabled()))
        asked = settings(config, tmp_path / str(again), gradient_checkpointing=again, **changes)
        train(policy, *([] if config is SFTConfig else [[parity]]), ROWS, asked)
        assert not any(module.training for module in policy.model.modules())
        found.append(({n: p.detach() for n, p in policy.model.named_parameters()}, sum(passes)))
    (expected, once), (weights, twice) = found
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert twice > once > 0


def test_layers_in_bfloat16_train_weights_in_float32(policy, tmp_path):
    ids = torch.arange(5, 25)[None]
    before = policy.forward(ids)
    with policy.computing(bf16=True, gradient_checkpointing=False):
        hidden = policy.forward(ids)
        assert policy.head(hidden).dtype == torch.float32
    assert (hidden - before).abs().max() > 0
    torch.testing.assert_close(hidden.float(), before, atol=0.1 * before.abs().max().item(), rtol=0)
    changes = {"steps": 2} if policy.denoises else {}
    config = settings(GRPOConfig, tmp_path / "run", bf16=True, learning_rate=5e-6, **changes)
    start = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    train_grpo(policy, [parity], ROWS, config)
    assert policy.forward(ids).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    assert any(not torch.equal(p, start[n]) for n, p in policy.model.named_parameters())


@pytest.mark.parametrize("train", [train_grpo, train_sft])
def test_weights_in_bfloat16_are_refused(train, mdm, tmp_path):
    mdm.model.model.to(torch.bfloat16)
    config = SFTConfig if train is train_sft else GRPOConfig
    rewards = [] if train is train_sft else [[parity]]
    with pytest.raises(InputError, match=r"bfloat16.*lost.*dtype='float32'.*bf16=True"):
        train(mdm, *rewards, ROWS, settings(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ar", "mdm", "bd"])
def test_completions_drawn_in_parts_are_those_drawn_at_once(family, request):
    policy, record = request.getfixturevalue(family), family != "ar"
    config, texts = SamplerConfig(max_new_tokens=8), [row["prompt"] for row in ROWS]
    once = generate(policy, texts, config, record=record)
    drawn = [generate(policy, texts[a : a + 3], config, record=record) for a in (0, 3)]
    joined = SamplerOutput.joined(drawn, policy.pad_token_id)
    for name in ("sequences", "prompt_mask", "completion_ids", "completion_mask"):
        assert torch.equal(getattr(joined, name), getattr(once, name)), name
    assert joined.completions == once.completions
    assert joined.token_lists() == once.token_lists()
    torch.testing.assert_close(joined.logprobs, once.logprobs, atol=1e-5, rtol=1e-4)
    for one, other in zip(joined.trajectory or (), once.trajectory or (), strict=True):
        for name in ("rows", "positions", "tokens", "remasked"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("own, drawn", [({}, 4), ({"per_device_rollout_batch_size": 6}, 6)])
@pytest.mark.parametrize("train, made", [(train_grpo, GRPOConfig), (train_ppo, PPOConfig)])
def test_a_rollout_takes_no_more_at_a_time(train, made, own, drawn, mdm, tmp_path, monkeypatch):
    sizes = []

    def counted(policy, prompts, *others):
        sizes.append(len(prompts))
        return sample(policy, prompts, *others)

    monkeypatch.setattr(type(mdm), "sampler", staticmethod(counted))
    changes = {"steps": 2, "gradient_accumulation_steps": 3, "num_generations": 6}
    changes |= {"value_batches": 2} if made is PPOConfig else {}
    train(mdm, [parity], ROWS, settings(made, tmp_path / "run", max_steps=1, **changes | own))
    assert set(sizes) == {drawn} and sum(sizes) == 12


def test_an_epoch_is_shuffled_once_and_prompts_are_not_padded_together(ar, monkeypatch):
    shuffle, calls = torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: calls.append(a) or shuffle(*a, **k))
    data._order.cache_clear()
    rows = [{"prompt": str(i)} for i in range(1000)]
    for step in range(50):
        data.rows_of_step(rows, 8, step, 0, 1, seed=3)
    assert len(calls) == 1
    monkeypatch.setattr(type(ar), "pad", None)
    data.checked_rows(ar, [*rows, {"prompt": "1" * 400}], [], 8)
    with pytest.raises(InputError, match="context of 512"):
        data.checked_rows(ar, [*rows, {"prompt": "1" * 600}], [], 8)
