"""TRL's options against its published formulas, and what a user sees of a run: its progress, what a
key press leaves, how it goes on, that nothing is learnt."""

import copy
import gc
import json
import math
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import Cut, nested, parity

import mdmrl.training.loop as loop
from mdmrl.config import InputError
from mdmrl.policies import add_lora
from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.grpo import train_grpo
from mdmrl.rl.objectives import divisor, grpo_loss
from mdmrl.rl.ppo import train_ppo
from mdmrl.rl.rollout import Rollout, collect, group_advantages
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig

ROWS = [{"prompt": f"A patient has {x}. Which test is decisive?"} for x in ("fever", "a rash", "x")]
NAN = math.nan


def length(prompts, completions, completion_ids, **columns):
    return [-len(ids) / 10 for ids in completion_ids]


def silent(prompts, **columns):
    return [None] * len(prompts)


def settings(folder="unused", family="mdm", **changes):
    small = {"output_dir": str(folder), "max_steps": 3, "max_completion_length": 8}
    small |= {"learning_rate": 3e-3, "logp_estimator": "exact" if family == "ar" else "one_step"}
    return GRPOConfig(**nested(small | ({} if family == "ar" else {"steps": 4}) | changes))


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def timeless(folder):
    kept = rows_of(folder)
    return [{k: v for k, v in row.items() if not k.endswith("_time")} for row in kept]


def bits(policy):
    state = [p.detach().clone() for p in policy.model.parameters()]
    return state + list(policy.reference_state().values())


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fresh(policy):
    return type(policy)(copy.deepcopy(policy.model), copy.deepcopy(policy.tokenizer))


# -- TRL's options ---------------------------------------------------------------------------------

GROUPS = [[1.0, 2.0, 3.0, 5.0], [0.5, 0.5, 0.5, 0.5], [NAN, 1.0, 2.0, 4.0], [NAN, NAN, NAN, 1.0]]


def deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_scaled_rewards_equal_a_scalar_loop(scale):
    """TRL: r - mean of its group, over (standard deviation + 1e-4) of the group or the batch."""
    found, counted = group_advantages(torch.tensor(GROUPS).double().flatten(), 4, scale)
    spoken = [r for group in GROUPS for r in group if not math.isnan(r)]
    expected = []
    for group in GROUPS:
        own = [r for r in group if not math.isnan(r)]
        mean = sum(own) / len(own)
        for r in group:
            if math.isnan(r) or len(own) < 2 or len(set(own)) == 1:
                expected.append(0.0)
            else:
                spread = deviation(spoken if scale == "batch" else own) + 1e-4
                expected.append((r - mean) / (1 if scale == "none" else spread))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert counted.tolist() == [not math.isnan(r) for group in GROUPS for r in group]


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_a_batch_without_rewards_has_no_advantages(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, counted = group_advantages(torch.full((4,), NAN).double(), 2, scale)
    assert found.tolist() == [0.0] * 4 and not counted.any()


def test_weighted_rewards_are_those_that_advantages_are_made_of(mdm):
    draws = generator_for(0, "rollout")
    config = SamplerConfig(max_new_tokens=8, steps=4, temperature=1.0)
    rollout, metrics, sample = collect(
        mdm,
        ROWS[:2],
        [parity, length],
        3,
        config,
        draws,
        reward_weights=[2.0, -0.5],
        scale_rewards="none",
    )
    both = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ids = [row[mask].tolist() for row, mask in both]
    judged = zip(parity(0, 0, ids), length(0, 0, ids), strict=True)
    expected = torch.tensor([2 * p - 0.5 * n for p, n in judged])
    torch.testing.assert_close(rollout.rewards, expected)
    assert metrics["reward"] == pytest.approx(expected.mean().item())
    assert metrics["rewards/parity/mean"] == pytest.approx(sum(parity(0, 0, ids)) / 6)
    means = expected.view(2, 3).mean(1, keepdim=True).expand(2, 3).flatten()
    torch.testing.assert_close(rollout.advantages, expected - means, atol=1e-6, rtol=1e-5)
    assert sample["rewards"] == pytest.approx(expected[:3].tolist())


def random_case():
    generator = torch.Generator().manual_seed(5)
    logp, old = (-2 * torch.rand(6, 8, generator=generator).double() for _ in range(2))
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 8, 6, 8])[:, None]
    advantages = torch.tensor([1.1, -0.7, 0.4, -1.3, 0.4, 0.9]).double()
    counted = torch.tensor([True, True, True, True, False, True])
    truncated = torch.tensor([True, False, False, True, False, False])
    ids = torch.zeros(6, 8, dtype=torch.long)
    sampler = SamplerConfig()
    return logp, old, Rollout(ids, mask, ids, mask, advantages, counted, sampler), truncated


def trl_loss(logp, old, rollout, config, truncated=None):
    """`GRPOTrainer._compute_loss` in scalars. TRL sets the masks of truncated completions to 0 and
    divides as if they were there; a sample that abstains is ours, and is not there at all."""
    total, tokens = 0.0, 0
    chosen = [i for i in range(6) if rollout.counted[i]]
    for i in chosen:
        a, n = rollout.advantages[i].item(), int(rollout.completion_mask[i].sum())
        if truncated is not None and truncated[i]:
            continue
        tokens += n
        losses = []
        for k in range(n):
            ratio = math.exp(logp[i][k] - old[i][k])
            inside = min(max(ratio, 1 - config.epsilon), 1 + config.epsilon_high)
            losses.append(-min(ratio * a, inside * a))
        total += sum(losses) / n if config.loss_type == "grpo" else sum(losses)
    long = len(chosen) * config.max_completion_length
    return total / {"grpo": len(chosen), "dr_grpo": long, "dapo": tokens}[config.loss_type]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("masked", [False, True])
def test_clipping_higher_and_masking_the_truncated_are_trls(loss_type, masked):
    logp, old, rollout, truncated = random_case()
    config = settings(epsilon=0.2, epsilon_high=0.5, beta=0.0, loss_type=loss_type)
    if masked:
        rollout.truncated = truncated
    found, _, seen = grpo_loss(logp, old, None, rollout, config)
    found = found / divisor(rollout, config)
    expected = trl_loss(logp.tolist(), old.tolist(), rollout, config, rollout.truncated)
    assert found.item() == pytest.approx(expected)
    ratio, positive = (logp - old).exp(), rollout.advantages[:, None] > 0
    assert torch.equal(seen["clipped"], torch.where(positive, ratio > 1.5, ratio < 0.8))
    assert ((ratio > 1.2) & (ratio < 1.5) & positive).any()  # what another limit lets through


@pytest.mark.parametrize("family", ["ar", "mdm"])
def test_a_run_masks_the_completions_that_have_no_end(family, request, tmp_path, monkeypatch):
    policy = request.getfixturevalue(family)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[policy.tokenizer.eos_token_id] *= 3
    seen = []

    def watched(logp, old, ref, rollout, config):
        seen.append(rollout)
        return grpo_loss(logp, old, ref, rollout, config)

    monkeypatch.setattr("mdmrl.rl.grpo.grpo_loss", watched)
    config = settings(tmp_path / "run", family, max_steps=1, mask_truncated_completions=True)
    train_grpo(policy, [parity], ROWS, config)
    (rollout,) = seen
    ends = set(policy.end_token_ids)
    expected = [not ends & set(ids) for ids in rollout.completion_ids.tolist()]
    assert rollout.truncated.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert rollout.counted.all() and torch.equal(rollout.learnt, ~rollout.truncated)


# -- what is computed ------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_without_beta_the_reference_is_not_scored(mdm, tmp_path, lora):
    """It costs a forward pass of every completion, which only `log_kl` asks for."""
    costs, weights = {}, {}
    for name, changes in {"0": {}, "logged": {"log_kl": True}, "charged": {"beta": 0.1}}.items():
        policy = fresh(mdm)
        if lora:
            add_lora(policy, r=4)
        asked = {"beta": 0.0, "max_steps": 2} | changes
        folder = train_grpo(policy, [parity], ROWS, settings(tmp_path / name, **asked))
        rows = rows_of(folder)[:-1]
        costs[name] = [row["token_forwards/scoring"] for row in rows]
        assert all(("kl" in row) == (name != "0") for row in rows)
        assert all("grad_norm/kl" not in row for row in rows)
        weights[name] = bits(policy)[: len(list(policy.model.parameters()))]
        assert (policy._reference is None) == (name == "0" or lora)
    assert costs["logged"] == costs["charged"] == [2 * cost for cost in costs["0"]]
    assert same(weights["0"], weights["logged"])


@pytest.mark.parametrize("apart", [False, True])
def test_a_micro_batch_is_let_go_before_the_next(mdm, tmp_path, monkeypatch, apart):
    """Of each there is its graph, the largest thing in memory."""
    held = []

    def watched(logp, *others):
        gc.collect()
        assert not any(logp() is not None for logp in held)
        held.append(weakref.ref(logp))
        return grpo_loss(logp, *others)

    monkeypatch.setattr("mdmrl.rl.grpo.grpo_loss", watched)
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_steps": 1}
    config = settings(tmp_path / "run", log_gradients=apart, **changes)
    train_grpo(mdm, [parity], ROWS, config)
    assert len(held) == 4


def test_gradient_norms_of_the_parts_change_nothing_else(mdm, tmp_path):
    found = {}
    for apart in (False, True):
        policy = fresh(mdm)
        config = settings(tmp_path / str(apart), log_gradients=apart, num_iterations=2)
        rows = rows_of(train_grpo(policy, [parity], ROWS, config))[:-1]
        found[apart] = [p.detach() for p in policy.model.parameters()], rows
    assert all("grad_norm/kl" in row for row in found[True][1])
    for one, other in zip(found[False][0], found[True][0], strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
    for one, other in zip(*(rows for _, rows in found.values()), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
        assert one.keys() == {k for k in other if not k.startswith("grad_norm/")}


# -- how a run ends, and goes on -------------------------------------------------------------------


def run_of(train, policy, folder, steps, reward, lora=False, **changes):
    """A run of so many updates, evaluated every second and kept every fifth."""
    policy = fresh(policy)
    if lora:
        add_lora(policy, r=4, seed=3)
    asked = {"output_dir": str(folder), "max_steps": steps, "max_completion_length": 8}
    asked |= {"eval_steps": 2, "save_steps": 5, "ref_model_sync_steps": 2, "learning_rate": 3e-3}
    asked |= {"sampler": {"steps": 4}, **changes}
    own = {"value_batches": 2} if train is train_ppo else {"logp_estimator": "one_step"}
    config = (PPOConfig if train is train_ppo else GRPOConfig)(**asked | own)
    train(policy, [reward], ROWS, config, ROWS[:1])
    return policy


@pytest.mark.parametrize("train", [train_grpo, train_ppo])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_is_extended_is_the_one_made_at_once(mdm, tmp_path, train, lora):
    whole = run_of(train, mdm, tmp_path / "whole", 5, Cut(), lora)
    run_of(train, mdm, tmp_path / "run", 3, Cut(), lora)
    assert rows_of(tmp_path / "run")[-1].keys() >= {"step", "eval/reward"}
    extended = run_of(train, mdm, tmp_path / "run", 5, Cut(), lora)
    assert same(bits(extended), bits(whole))
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert rows_of(tmp_path / "run", "samples") == rows_of(tmp_path / "whole", "samples")
    held = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("run", "whole"))
    assert next(held) == next(held)


def drawn(prompts, completions, completion_ids, **columns):
    """A reward that is noise, of all three global generators."""
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completion_ids]


@pytest.mark.parametrize("train", [train_grpo, train_ppo])
def test_a_reward_may_draw_from_the_global_random_numbers(mdm, tmp_path, train):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = run_of(train, mdm, tmp_path / "whole", 5, drawn)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before
    run_of(train, mdm, tmp_path / "run", 3, drawn)
    random.random(), np.random.rand(), torch.rand(())  # as in another process
    extended = run_of(train, mdm, tmp_path / "run", 5, drawn)
    assert same(bits(extended), bits(whole))
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    rewards = [row["reward"] for row in rows_of(tmp_path / "run") if row.get("reward")]
    assert len({*rewards}) == len(rewards) == 5


def test_a_key_press_leaves_a_run_that_goes_on(mdm, tmp_path):
    whole = run_of(train_grpo, mdm, tmp_path / "whole", 7, Cut())
    for call in (1, 9, 2):  # before the first update; in the middle; in what is made again
        with pytest.raises(KeyboardInterrupt):
            run_of(train_grpo, mdm, tmp_path / "run", 7, Cut(call, by=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # in the same process: nothing holds the folder
            run_of(train_grpo, mdm, tmp_path / "run", 7, Cut(1, by=KeyboardInterrupt))
    again = run_of(train_grpo, mdm, tmp_path / "run", 7, Cut())
    assert same(bits(again), bits(whole))
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("train", [train_grpo, train_ppo])
def test_a_run_in_which_nothing_counts_says_so_and_ends(mdm, tmp_path, train):
    with (
        pytest.warns(
            UserWarning, match=r"at step \d every reward \(silent\) returned None"
        ) as said,
        pytest.raises(InputError, match=r"at step 4 every reward \(silent\).*nothing is learnt"),
    ):
        run_of(train, mdm, tmp_path / "run", 9, silent)
    steps = [int(str(w.message).split()[2]) for w in said if "silent" in str(w.message)]
    assert steps == [0, 1, 2, 3]
    rows = rows_of(tmp_path / "run")
    assert [row["reward"] for row in rows] == [None] * 4


@pytest.mark.parametrize("train", [train_grpo, train_ppo])
def test_samples_for_which_a_reward_fails_stop_the_run_or_are_masked(mdm, tmp_path, train):
    def breaks(prompts, completions, completion_ids, **columns):
        found = parity(prompts, completions, completion_ids)
        return [math.nan, *found[1:]]

    with pytest.raises(InputError, match="reward 'breaks' returned nan"):
        run_of(train, mdm, tmp_path / "stopped", 2, breaks)
    with pytest.warns(UserWarning, match="reward 'breaks' failed for 1 of"):
        run_of(train, mdm, tmp_path / "run", 2, breaks, failed_rewards="mask")
    first = rows_of(tmp_path / "run")[0]
    assert 0 < first["rewards/breaks/failed"] < 1 and math.isfinite(first["reward"])
    with pytest.raises(InputError, match="unknown failed_rewards 'maks': did you mean 'mask'"):
        settings(tmp_path, failed_rewards="maks")


def test_a_process_without_rewards_has_no_part_in_the_mean_of_all(mdm, monkeypatch):
    config = SamplerConfig(max_new_tokens=8, steps=4, temperature=1.0)
    draws = generator_for(0, "rollout")
    (_, none, _), (_, some, _) = (
        collect(mdm, ROWS[:1], [reward], 2, config, draws) for reward in (silent, parity)
    )
    monkeypatch.setattr(loop, "gather_object", lambda found: [none, some])
    assert none["reward"] is none["rewards/silent/mean"] is None
    assert loop.averaged(none)["reward"] == some["reward"]


def test_one_reward_that_speaks_is_enough(mdm, tmp_path):
    """Each abstains from what the other judges."""

    def first(prompts, completions, completion_ids, kind, **columns):
        return [
            1.0 * len(i) if k == "a" else None for i, k in zip(completion_ids, kind, strict=True)
        ]

    def second(prompts, completions, completion_ids, kind, **columns):
        return [
            -1.0 * len(i) if k == "b" else None for i, k in zip(completion_ids, kind, strict=True)
        ]

    rows = [{**row, "kind": kind} for row, kind in zip(ROWS, "aba", strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder = train_grpo(mdm, [first, second], rows, settings(tmp_path / "run", max_steps=2))
    assert all(math.isfinite(row["reward"]) for row in rows_of(folder)[:-1])


# -- what is shown ---------------------------------------------------------------------------------


def test_progress_is_shown_without_a_terminal(mdm, tmp_path, capfd):
    """The first update and the last, and what lies 8 s apart."""
    train_grpo(mdm, [parity], ROWS, settings(tmp_path / "my-run"))
    found = capfd.readouterr()
    assert found.out == ""
    first, last = [x for x in found.err.splitlines() if x.startswith("my-run: ")]
    reward = rows_of(tmp_path / "my-run")[0]["reward"]
    assert first.startswith(f"my-run: update 1 of 3, reward {reward:.4g}, loss ")
    assert last.startswith("my-run: update 3 of 3, ") and last.endswith(" left")


def test_progress_is_a_bar_on_a_terminal(mdm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train_grpo(mdm, [parity], ROWS, settings(tmp_path / "my-run"))
    shown = capsys.readouterr().err
    assert "my-run: 100%" in shown and "3/3" in shown
