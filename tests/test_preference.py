"""DPO and rejection-sampling fine-tuning: losses, which noise is shared, and what runs survive."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import Cut, Interrupted, random_policy

import mdmrl.rl.preference as preference
from mdmrl import cli
from mdmrl.policies import add_lora, load_policy
from mdmrl.rl.preference import DPOConfig, dpo_loss, losses, train_dpo
from mdmrl.rl.rejection import RFTConfig, draw_graded, sampled_pairs, train_rft
from mdmrl.runs import generator_for, read_rows
from mdmrl.zoo.toy import toy_policy

ROWS = [
    {"prompt": "Name a fruit.", "chosen": "an apple", "rejected": "a car"},
    {"prompt": "And a tall tree?", "chosen": "oak", "rejected": "so it is"},
    {"prompt": "Stone?", "chosen": "flint", "rejected": "sea"},
]
HELD_OUT = [{"prompt": "A bird?", "chosen": "a wren", "rejected": "cod"}]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
NAMES = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
NAMES += ["loss", "logps/chosen", "logps/rejected"]


def settings(kind, folder="unused", policy=None, **changes):
    small = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 12,
        "save_steps": 1,
        "eval_steps": 2,
    }
    own = {"sampler": {"steps": 3}} if policy is not None and policy.denoises else {}
    return kind(**small | own | changes)


def fresh(base, lora=False):
    policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
    if lora:
        add_lora(policy, r=2)
    return policy


# -- direct preference optimisation ----------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_loss_equals_a_scalar_loop(loss_type):
    generator = generator_for(0, "logps")
    logp, ref = (-5 * torch.rand(6, generator=generator).double() for _ in range(2))
    found = dpo_loss(logp, ref, DPOConfig(beta=0.3, loss_type=loss_type))
    for i in range(3):
        chosen, rejected = (logp[k] - ref[k] for k in (2 * i, 2 * i + 1))
        margin = 0.3 * (chosen - rejected).item()
        expected = math.log1p(math.exp(-margin))
        if loss_type == "ipo":
            expected = (margin / 0.3 - 1 / 0.6) ** 2
        assert found["loss"][i].item() == pytest.approx(expected, rel=1e-12)
        assert found["rewards/chosen"][i].item() == pytest.approx(0.3 * chosen.item())
        assert found["rewards/rejected"][i].item() == pytest.approx(0.3 * rejected.item())
        assert found["rewards/margins"][i].item() == pytest.approx(margin)
        assert found["rewards/accuracies"][i] == (margin > 0)
        assert found["logps/chosen"][i] == logp[2 * i]
        assert found["logps/rejected"][i] == logp[2 * i + 1]


def test_policy_and_reference_share_their_noise_unless_told_otherwise(mdm):
    """The same weights are then the same log-probability, and every reward is 0."""
    mdm.sync_reference()
    config = settings(DPOConfig, policy=mdm)
    pairs = preference.encode_preferences(mdm, ROWS, 12)
    rewards = {}
    for named in ("elbo-2", "elbo-2-unshared"):
        scorer = preference.estimator(named, mdm)
        parts = losses(mdm, pairs, scorer, generator_for(0, "noise"), config)
        rewards[named] = torch.cat([part["rewards/chosen"].detach() for part in parts])
    assert rewards["elbo-2"].abs().max() < 1e-4
    assert rewards["elbo-2-unshared"].abs().min() > 1e-2


def test_micro_batches_give_the_gradient_of_the_whole(any_policy, tmp_path):
    rows = []
    for size, steps in ((3, 1), (1, 3)):
        policy = fresh(any_policy)
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        config = settings(DPOConfig, tmp_path / str(size), policy, max_steps=2, **shape)
        rows.append(read_rows(train_dpo(policy, ROWS, config) / "metrics.jsonl"))
    for one, other in zip(rows[0][:2], rows[1][:2], strict=True):
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_preferences_are_learnt(any_policy, tmp_path, rng_untouched):
    policy = any_policy
    config = settings(DPOConfig, tmp_path / "run", policy, max_steps=12)
    folder = train_dpo(policy, ROWS, config, HELD_OUT, lambda text, row: True)
    rows = read_rows(folder / "metrics.jsonl")
    assert {*NAMES, "grad_norm", "token_forwards/scoring", "step_time"} <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[11]["rewards/margins"] > 0.2
    assert rows[11]["rewards/accuracies"] == 1
    for row in (rows[0], rows[-1]):
        assert {f"eval/{name}" for name in NAMES} <= row.keys()
        assert row["eval/accuracy"] == 1
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "loss" not in rows[-1]


@pytest.mark.parametrize(("family", "lora"), [("ar", False), ("mdm", True)])
def test_a_resumed_dpo_run_gives_the_bits_of_an_uninterrupted_one(
    shared_policies, tmp_path, monkeypatch, family, lora
):
    real = preference.rows_of_step

    def run(folder, cut=None):
        def rows_of_step(pairs, count, step, *rest):
            if step == cut:
                raise Interrupted
            return real(pairs, count, step, *rest)

        monkeypatch.setattr(preference, "rows_of_step", rows_of_step)
        policy = fresh(shared_policies[family], lora)
        train_dpo(policy, ROWS, settings(DPOConfig, folder, policy), HELD_OUT)
        return policy

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", cut=2)
    again = run(tmp_path / "cut")
    assert_same(whole, again, tmp_path)


def assert_same(whole, again, folder):
    for (name, one), other in zip(
        whole.trainable_parameters().items(), again.trainable_parameters().values(), strict=True
    ):
        assert torch.equal(one, other), name
    runs = [read_rows(folder / run / "metrics.jsonl") for run in ("whole", "cut")]
    for one, other in zip(*runs, strict=True):
        for row in (one, other):
            for name in [name for name in row if name.endswith("_time")]:
                del row[name]
        assert one == other


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "no training rows"),
        ([{"prompt": "x", "chosen": "y"}], {}, "row 1 has the fields prompt, chosen: expected"),
        ([HELD_OUT[0]], {}, "the held-out prompt 'A bird.' is among the training rows"),
        ([ROWS[0] | {"rejected": "1 " * 20}], {}, "row 1, completion .*expected at most"),
        ([ROWS[0] | {"rejected": ROWS[0]["chosen"]}], {}, "row 1 has the same text .*expected two"),
        (ROWS, {"logp_estimator": "trajectory"}, "scores the steps .*expected another"),
        (ROWS, {"logp_estimator": "exact"}, "is not for policies of kind 'mdm'"),
    ],
)
def test_bad_pairs_and_estimators_are_refused_before_any_work(
    mdm, tmp_path, rows, changes, message
):
    config = settings(DPOConfig, tmp_path / "run", mdm, **changes)
    with pytest.raises(ValueError, match=message):
        train_dpo(mdm, rows, config, HELD_OUT)
    assert not (tmp_path / "run").exists()


def test_held_out_rows_are_pairs_or_are_judged(mdm, tmp_path):
    config, rows = settings(DPOConfig, tmp_path / "run", mdm, max_steps=1), [{"prompt": "A fish?"}]
    with pytest.raises(ValueError, match="1 of 2 eval_rows are no pairs"):
        train_dpo(mdm, ROWS, config, HELD_OUT + rows)
    train_dpo(mdm, ROWS, config, HELD_OUT + rows, metric=lambda text, row: True)
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[0]["eval/accuracy"] == 1


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (DPOConfig, "beta", 0),
        (DPOConfig, "loss_type", "sigmod"),
        (RFTConfig, "num_generations", 0),
        (RFTConfig, "temperature", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(kind, name, value):
    with pytest.raises(ValueError, match=name.replace("_", ".")):
        settings(kind, **{name: value})


# -- rejection sampling ----------------------------------------------------------------------------


def rewarded(word):
    def reward(prompts, completions, **columns):
        return [float(word in text) for text in completions]

    return reward


def toy(family="mdm"):
    return toy_policy("abc", family)


TOY_ROWS = [{"prompt": "ab"}, {"prompt": "ba"}]


def right_of(groups):
    """How many completions are right."""
    return sum(one.reward == 1 for group in groups for one in group)


def rft(folder, policy, **changes):
    own = {"num_generations": 8, "max_completion_length": 4}
    own |= {"sampler": {"steps": 4}} if policy.denoises and policy.block_length else {}
    return settings(RFTConfig, folder, policy, **own | changes)


@pytest.mark.parametrize("family", ["ar", "mdm", "bd"])
def test_what_is_kept_is_right_and_different_and_becomes_more_probable(tmp_path, family):
    policy, reward = toy(family), rewarded("a")
    config = rft(tmp_path / "run", policy, max_steps=30, per_device_train_batch_size=16)
    before = right_of(draw_graded(policy, [reward], TOY_ROWS * 8, config))
    groups = draw_graded(policy, [reward], TOY_ROWS, config)
    assert [len(group) for group in groups] == [8, 8]
    assert [{one.ids[0] for one in group} for group in groups] == [{(0, 1)}, {(1, 0)}]
    drawn = groups[0] + groups[1]
    assert all((one.reward == 1) == ("a" in one.text) for one in drawn)
    rows = read_rows(train_rft(policy, [reward], TOY_ROWS, config) / "metrics.jsonl")
    assert rows[0]["right"] == right_of(groups) / 16
    assert rows[0]["kept"] == len({one.ids for one in drawn if one.reward == 1})
    assert rows[0]["token_forwards"] > 0
    assert "token_forwards" not in rows[1]
    assert rows[29]["loss"] < rows[0]["loss"]
    assert right_of(draw_graded(policy, [reward], TOY_ROWS * 8, config)) > before + 10


@pytest.mark.parametrize("family", ["ar", "mdm"])
def test_online_it_learns_from_the_policy_as_it_is(tmp_path, family):
    policy, reward = toy(family), rewarded("b")
    shape = {"max_steps": 30, "per_device_train_batch_size": 32}
    config = rft(tmp_path / "run", policy, online=True, **shape)
    rows = read_rows(train_rft(policy, [reward], TOY_ROWS, config) / "metrics.jsonl")
    assert rows[0]["right"] == rows[0]["reward"]
    assert all(row["token_forwards"] > 0 for row in rows[:-1])
    assert sum(row["right"] for row in rows[25:30]) > sum(row["right"] for row in rows[:5]) + 0.5


@pytest.mark.parametrize("online", [False, True])
def test_a_policy_that_is_right_nowhere_is_told_so(tmp_path, online):
    policy = toy()
    config = rft(
        tmp_path / "run", policy, online=online, max_steps=9, per_device_train_batch_size=8
    )
    with pytest.raises(ValueError, match=r"none of \d+ completions .* reward_threshold=1.0"):
        train_rft(policy, [rewarded("z")], TOY_ROWS, config)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("family", "lora"), [("ar", True), ("mdm", False)])
def test_a_resumed_rft_run_gives_the_bits_of_an_uninterrupted_one(
    shared_policies, tmp_path, family, lora, online
):
    def run(folder, reward):
        policy = fresh(shared_policies[family], lora)
        config = rft(folder, policy, online=online, reward_threshold=0.5, num_generations=2)
        train_rft(policy, [reward], PROMPTS, config, [{"prompt": "A bird?"}])
        return policy

    whole = run(tmp_path / "whole", Cut())
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Cut(call=4 if online else 3))
    again = run(tmp_path / "cut", Cut())
    assert_same(whole, again, tmp_path)


def test_pairs_are_right_beside_wrong_and_dpo_takes_them(tmp_path):
    policy = toy("ar")
    config = rft("unused", policy, num_generations=16, max_completion_length=6)
    pairs = sampled_pairs(policy, [rewarded("a")], TOY_ROWS, config)
    assert all("a" in row["chosen"] and "a" not in row["rejected"] for row in pairs)
    assert len({row["chosen"] for row in pairs if row["prompt"] == "ab"}) == len(
        [row for row in pairs if row["prompt"] == "ab"]
    )
    train_dpo(policy, pairs, settings(DPOConfig, tmp_path / "run", max_completion_length=6))
    with pytest.raises(ValueError, match="on both sides of reward_threshold"):
        sampled_pairs(policy, [rewarded("z")], TOY_ROWS, config)


# -- the command -----------------------------------------------------------------------------------


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mdmrl", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def files(mdm, tmp_path):
    mdm.save_pretrained(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (tmp_path / "mine.py").write_text(
        "def one(prompts, **columns):\n    return [1.0] * len(prompts)"
    )
    shared = {"max_steps": 1, "max_completion_length": 12, "sampler": {"steps": 2}}
    (tmp_path / "small.yaml").write_text(json.dumps(shared))
    return tmp_path


def test_the_command_learns_from_pairs_and_from_right_answers(files, monkeypatch, capsys):
    base = ["--policy", files / "base", files / "small.yaml"]
    pairs = ["--data", files / "pairs.jsonl", f"output_dir={files / 'dpo'}"]
    assert call(monkeypatch, "--algorithm", "dpo", *base, *pairs) == 0
    assert "rewards/margins" in read_rows(files / "dpo" / "metrics.jsonl")[0]
    prompts = ["--data", files / "prompts.jsonl", "--reward", f"{files / 'mine.py'}:one"]
    own = ["num_generations=2", f"output_dir={files / 'rft'}"]
    assert call(monkeypatch, "--algorithm", "rft", *base, *prompts, *own) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(files / "rft")
    assert read_rows(files / "rft" / "metrics.jsonl")[0]["right"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "dpo"], "mdmrl: dpo learns from pairs: give --data FILE"),
        (["--algorithm", "dpo", "--task", "countdown"], "mdmrl: dpo learns from pairs: give"),
        (["--algorithm", "dpo", "--data", "prompts.jsonl"], "prompts.jsonl:1: field 'chosen' is"),
        (
            ["--algorithm", "dpo", "--data", "pairs.jsonl", "--reward", "mine.py:one"],
            "mdmrl: --reward is not for dpo",
        ),
        (["--algorithm", "rft", "--draw", "mine.py:one"], "mdmrl: --draw is for grpo, not rft"),
        (["--algorithm", "dp"], "unknown algorithm 'dp': did you mean 'dpo'"),
        (["--task", "countdown", "sampler.step_sizes=[5, 6]"], "add up to the block of 12"),
    ],
)
def test_combinations_that_make_no_sense_are_one_line(
    files, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(files)
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


# -- several processes -----------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
from mdmrl import DPOConfig, RFTConfig, load_policy, train_dpo, train_rft

base, folder, pairs, prompts = map(json.loads, sys.argv[1:])
small = {"max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
small |= {"max_completion_length": 12}
train_dpo(load_policy(base), pairs, DPOConfig(output_dir=folder + "/dpo", **small))

def share(prompts, completions, completion_ids, **columns):
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]

own = {"reward_threshold": 0.4, "num_generations": 2}
config = RFTConfig(output_dir=folder + "/rft", **small, **own)
train_rft(load_policy(base), [share], prompts, config)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_both_shares(tokenizer, tmp_path):
    policy = random_policy("ar", tokenizer)
    policy.save_pretrained(tmp_path / "base")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    given = (str(tmp_path / "base"), str(tmp_path), ROWS, PROMPTS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *(tmp_path / "script.py", *map(json.dumps, given)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    config = settings(DPOConfig, tmp_path / "one", max_steps=2)
    expected = read_rows(train_dpo(policy, ROWS, config) / "metrics.jsonl")
    found = read_rows(tmp_path / "dpo" / "metrics.jsonl")
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    tuned = dict(
        load_policy(
            tmp_path / "dpo" / "checkpoints" / "step-000002" / "pretrained"
        ).model.named_parameters()
    )
    for name, weight in policy.model.named_parameters():
        torch.testing.assert_close(tuned[name], weight, atol=1e-3, rtol=1e-3, msg=name)
    (first, *_) = read_rows(tmp_path / "rft" / "metrics.jsonl")
    assert 0 < first["kept"] <= 6
    assert 0 < first["right"] <= 1
