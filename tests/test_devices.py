"""Which device is picked, and that everything happens there: on a card made of nothing."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from accelerate import PartialState
from fake_card import FakeCard
from torch import Tensor

from mdmrl import (
    GRPOConfig,
    PPOConfig,
    SamplerConfig,
    SFTConfig,
    add_lora,
    generate,
    load_policy,
    train_grpo,
    train_ppo,
    train_sft,
)
from mdmrl.cli import app
from mdmrl.config import InputError
from mdmrl.provenance import environment, machine, pick_device
from mdmrl.rewards.medical import SentenceEncoder
from mdmrl.rl.config import EPISODE
from mdmrl.rl.divergence import path_kl
from mdmrl.rl.oracle import denoiser_of
from mdmrl.rl.values import fit_to_base
from mdmrl.runs import generator_for, kept_random_state
from mdmrl.sampling.generate import infill
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.sampling.guided import calibrate, generate_guided
from mdmrl.sampling.hierarchy import Unit, generate_hierarchy
from mdmrl.training.loop import accelerator_for


@pytest.fixture
def cards(monkeypatch):
    """Sets how many cards this torch sees."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"Card {device}")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    see(0)
    return see


def test_the_card_is_picked_where_there_is_one(cards, monkeypatch):
    assert pick_device() == pick_device("cpu") == pick_device(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == pick_device("mps") == "mps"
    cards(2)
    assert pick_device() == pick_device("cuda") == "cuda"
    assert pick_device("cuda:1") == "cuda:1" and pick_device("cpu") == "cpu"


def test_each_process_has_a_card_of_its_own(cards, monkeypatch):
    cards(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device() == pick_device("cuda") == pick_device("cuda:1") == "cuda:1"
    with pytest.raises(InputError, match="cuda:0 asked by process 1 of 2: ask for cuda"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes on this machine, but each sees 2 cards"):
        pick_device()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="3 processes"):
        pick_device()
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("cuda", "cuda asked, but this torch .* sees no card: ask for cpu"),
        ("cuda:0", "cuda:0 asked, but this torch .* sees no card"),
        ("mps", "mps asked, but this torch sees no Apple GPU"),
        ("gpu", "unknown device 'gpu': .*known: auto, cpu, cuda, mps"),
        ("cuda:one", "unknown device 'cuda:one'"),
        ("cuda:", "unknown device 'cuda:'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(cards, asked, says):
    with pytest.raises(InputError, match=says):
        pick_device(asked)


def test_a_card_beyond_the_last_is_refused(cards):
    cards(2)
    with pytest.raises(InputError, match="cuda:2 asked, but the last of the 2 cards is cuda:1"):
        pick_device("cuda:2")


def test_provenance_names_the_device_of_the_policy(cards):
    cards(2)
    assert machine("cuda:1") == "Card cuda:1" == environment("cuda:1")["machine"]
    assert "cores" in machine("cpu") and environment(torch.device("cpu"))["machine"] == machine(
        "cpu"
    )


# -- the card made of nothing ----------------------------------------------------------------------


@pytest.fixture
def card():
    """The second of two cards, without doubles; whatever touches the first one is an error."""
    with FakeCard(float64=False) as card:
        yield card


def test_the_fake_card_refuses_what_a_card_does(card):
    there, here = torch.ones(3, device="cuda:1"), torch.ones(3)
    first = torch.tensor([0])
    assert (there + here.sum()).device == there[first].device == there.new_ones(2).device
    assert here.copy_(there).device == there.cpu().device == torch.device("cpu")
    refused = {
        "same device": [
            lambda: there + here,
            lambda: here[first.to(card.device)],
            lambda: here.add_(there.sum()),
            lambda: torch.stack([here.sum(), there.sum()]),
            lambda: there.gather(0, first),
        ],
        "cuda.* was asked for": [
            lambda: torch.ones(3, device="cuda"),
            lambda: here.cuda(),
            lambda: here.to("cuda:0"),
            lambda: torch.random.fork_rng().__enter__(),
        ],
        "a generator of cpu": [
            lambda: torch.rand(3, device="cuda:1", generator=torch.Generator()),
            lambda: there.exponential_(generator=torch.Generator()),
        ],
        "a generator of cuda:1": [lambda: torch.rand(3, generator=torch.Generator("cuda:1"))],
        "float64": [there.double, lambda: here.double().to(card.device)],
        "numpy": [there.numpy],
    }
    for says, attempts in refused.items():
        for attempt in attempts:
            with pytest.raises((RuntimeError, TypeError), match=says):
                attempt()


def test_gradients_and_copies_stay_on_the_fake_card(card):
    layer = torch.nn.Linear(3, 2).to("cuda:1")
    loss = torch.nn.functional.cross_entropy(
        layer(torch.ones(4, 3).to(layer.weight)), (torch.arange(4, device="cuda:1") % 2)
    )
    loss.backward()
    found = [loss, layer.weight.grad, *copy.deepcopy(layer).parameters()]
    assert {x.device for x in found} == {card.device}


# -- everything on it ------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"A patient has {x}. Which test?", "completion": f"<answer>{x}</answer>"}
    for x in ("fever", "a rash", "x", "gout")
]
WAYS = [
    ("ar", {}),
    ("ar", {"temperature": 0.0}),
    ("ar", {"top_k": 9, "top_p": 0.9}),
    *(
        (family, rule)
        for family in ("mdm", "bd")
        for rule in (
            {},
            {"remasking": "state_confidence"},
            {"remasking": "state_confidence", "order_temperature": 0.5, "end_last": False},
            {"remasking": "margin", "temperature": 0.0},
            {"remasking": "entropy", "top_k": 9, "top_p": 0.9},
            {"remasking": "sequential"},
            {"remasking": "random"},
            {"threshold": 0.2, "steps": None},
            {"entropy_bound": 0.5, "steps": None},
            {"revise": 1},
        )
    ),
    ("mdm", {"cfg_scale": 0.5}),
    ("mdm", {"cache": "prefix", "block_length": 4, "cache_refresh": 2}),
    ("mdm", {"cache": "dual", "block_length": 4}),
]


LEFT = [None]  # calls of the reward that are left before the run is broken off


class Interrupted(Exception):
    pass


def parity(prompts, completions, completion_ids, **columns):
    """The share of odd token ids: it varies within a group."""
    if LEFT[0] is not None:
        LEFT[0] -= 1
        if LEFT[0] < 0:
            LEFT[0] = None
            raise Interrupted
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def same_draws(monkeypatch):
    """The samplers draw on a processor as they do on a card."""

    def race(weights, generator):
        clocks = torch.empty_like(weights).exponential_(generator=generator)
        return (weights / clocks).argmax(-1), weights.sum(-1)

    monkeypatch.setattr("mdmrl.sampling.choose.draw_in_proportion", race)


def tensors_of(x) -> dict[str, Tensor]:
    found = {field.name: getattr(x, field.name) for field in fields(x)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def moved(policy, device):
    """A copy of the policy on the device."""
    there = type(policy)(copy.deepcopy(policy.model).to(device), policy.tokenizer)
    assert {x.device for x in there.model.state_dict().values()} == {torch.device(device)}
    return there


def test_a_policy_is_loaded_onto_its_card(any_policy, tmp_path, card, monkeypatch):
    any_policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, device="cuda:1")
    assert {x.device for x in loaded.model.state_dict().values()} == {card.device}
    assert loaded.device == card.device and loaded.fingerprint() == any_policy.fingerprint()
    add_lora(loaded, r=2).save_pretrained(tmp_path / "adapter")
    adapted = load_policy(tmp_path / "adapter", device="cuda:1")
    assert {x.device for x in adapted.model.state_dict().values()} == {card.device}
    loaded.sync_reference()
    assert {x.device for x in loaded.model.state_dict().values()} == {card.device}
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert load_policy(tmp_path).device == card.device


@pytest.mark.parametrize(("family", "changes"), WAYS, ids=str)
def test_completions_are_drawn_on_the_card(family, changes, request, card, same_draws):
    steps = {} if family == "ar" else {"steps": 4}
    config = SamplerConfig(**{"max_new_tokens": 8, "temperature": 1.0} | steps | changes)

    def does(policy):
        draw = generator_for(0, "draw", device=policy.device)
        return generate(policy, ["a", "what is gout?"], config, draw, record=policy.kind != "ar")

    policy = request.getfixturevalue(family)
    here, there = does(policy), does(moved(policy, card.device))
    assert {x.device for x in tensors_of(there).values()} == {card.device}
    assert torch.equal(here.sequences, there.sequences.cpu())


def test_the_other_ways_of_writing_stay_on_the_card(mdm, ar, card):
    mdm, ar = moved(mdm, card.device), moved(ar, card.device)
    filled = infill(mdm, [f"a {mdm.tokenizer.mask_token} c"])
    assert {x.device for x in tensors_of(filled).values()} == {card.device}
    units = [Unit("a", "<a>", "</a>"), Unit("b", "<b>", "</b>")]
    phases = [SamplerConfig(max_new_tokens=3, steps=3), SamplerConfig(max_new_tokens=4, steps=2)]
    generate_hierarchy(mdm, ["x", "longer"], units, *phases, length=24)
    generate_hierarchy(ar, ["x"], units, *(p.replace(steps=None) for p in phases), length=24)

    sampler = SamplerConfig(max_new_tokens=8, steps=4, temperature=1.0, **EPISODE)
    config = PPOConfig(max_completion_length=8, sampler={"steps": 4}, value_batches=2)
    values, _ = fit_to_base(mdm, [parity], ROWS, config)
    judge, guide = lambda states: values(states.features), GuideConfig(budget=2.0)
    thresholds = calibrate(mdm, ["a", "b", "c"], sampler, guide, judge)
    guided = generate_guided(mdm, ["x", "y"], sampler, guide, judge, thresholds)
    assert guided.sequences.device == next(values.parameters()).device == card.device
    draw = generator_for(0, "kl", device=card.device)
    assert path_kl(mdm, moved(mdm, card.device), ["x"], sampler, draw).device == card.device

    denoiser = denoiser_of(mdm, "x", 4)
    assert denoiser(torch.full((1, 4), mdm.mask_token_id)).dtype == torch.float64


def test_the_encoder_of_rewards_is_where_the_policy_is(monkeypatch):
    """On its card, whichever that is; on the processor beside a policy that is there, whatever the
    machine has and however many processes share it."""
    with FakeCard(float64=False) as card:
        load_policy("tiny-ar", device="cuda:1")
        encoder = SentenceEncoder()
        there = encoder.embed(["gout"])
        assert encoder.model.device == card.device
    monkeypatch.setenv("LOCAL_RANK", "3")
    with FakeCard():
        load_policy("tiny-ar", device="cpu")
        encoder = SentenceEncoder()
        here = encoder.embed(["gout"])
        assert encoder.model.device == torch.device("cpu")
    assert here == pytest.approx(there, abs=1e-5)


def grpo(policy, folder, **changes):
    small = {"max_steps": 1, "num_generations": 3, "per_device_train_batch_size": 6}
    small |= {"max_completion_length": 8, "save_steps": 1, "eval_steps": 1, "learning_rate": 1e-3}
    steps = {"steps": 4} if policy.denoises else {}
    sampler = steps | changes.pop("sampler", {})
    config = GRPOConfig(output_dir=str(folder), sampler=sampler, **small | changes)
    return train_grpo(policy, [parity], ROWS, config, ROWS[:1], lambda text, row: "e" in text)


def ppo(policy, folder, **changes):
    small = {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4}
    small |= {"max_completion_length": 8, "value_batches": 2, "sampler": {"steps": 4}}
    small |= {"save_steps": 1, "eval_steps": 1, "output_dir": str(folder)}
    return train_ppo(policy, [parity], ROWS, PPOConfig(**small | changes), ROWS[:1])


def sft(policy, folder, **changes):
    small = {"max_steps": 1, "per_device_train_batch_size": 2, "max_completion_length": 24}
    small |= {"save_steps": 1, "eval_steps": 1, "output_dir": str(folder)}
    return train_sft(policy, ROWS[:3], SFTConfig(**small | changes), ROWS[3:])


TRAININGS = {
    "ar": (grpo, {}),
    "mdm": (grpo, {}),
    "bd": (grpo, {}),
    "ar-lora": (grpo, {"num_iterations": 2, "ref_model_sync_steps": 1, "kl_in_reward": True}),
    "mdm-one-step": (grpo, {"logp_estimator": "one_step", "log_gradients": True}),
    "bd-one-step": (grpo, {"logp_estimator": "one_step", "scale_rewards": "batch"}),
    "mdm-coupled": (grpo, {"logp_estimator": "coupled"}),
    "bd-elbo": (grpo, {"logp_estimator": "elbo-2"}),
    "mdm-wd1": (grpo, {"loss_type": "wd1"}),
    "mdm-spg": (grpo, {"loss_type": "spg", "logp_estimator": "elbo-2"}),
    "mdm-random": (
        grpo,
        {"logp_estimator": "trajectory-positions", "sampler": {"remasking": "random"}},
    ),
    "mdm-confidence": (
        grpo,
        {"logp_estimator": "trajectory-positions", "sampler": {"remasking": "low_confidence"}},
    ),
    "mdm-ppo": (ppo, {}),
    "bd-ppo": (ppo, {"kl_in_reward": True}),
    "ar-sft": (sft, {}),
    "mdm-sft-lora": (sft, {}),
    "bd-sft": (sft, {}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_happens_on_the_card_and_gives_what_the_processor_gives(
    name, shared_policies, tmp_path, same_draws
):
    family, (train, changes) = name.partition("-")[0], TRAININGS[name]
    base, found = shared_policies[family], {}
    for device, where in (("cpu", nullcontext()), ("cuda:1", FakeCard(float64=False))):
        with where:
            policy = moved(base, device)
            if "lora" in name:
                add_lora(policy, r=2)
            folder = train(policy, tmp_path / device, **changes)
            state = {**policy.model.state_dict(), **policy.reference_state()}
            assert {x.device for x in state.values()} == {torch.device(device)}
            found[device] = {name: x.cpu() for name, x in state.items()}
        ours = json.loads((folder / "environment.json").read_text())["machine"]
        assert (ours == "Fake card 1") == (device == "cuda:1")
    for key, value in found["cpu"].items():
        torch.testing.assert_close(found["cuda:1"][key], value, atol=1e-4, rtol=1e-3, msg=key)


def test_a_card_without_bfloat16_is_not_asked_for_it(shared_policies, tmp_path, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    policy = moved(shared_policies["mdm"], card.device)
    with pytest.raises(InputError, match="this card has no bfloat16"):
        grpo(policy, tmp_path / "run", bf16=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mdm-ppo", "ar-lora"])
def test_a_run_is_resumed_on_the_card(name, shared_policies, card, tmp_path):
    family, (train, changes) = name.partition("-")[0], TRAININGS[name]

    def start(folder):
        policy = moved(shared_policies[family], card.device)
        if "lora" in name:
            add_lora(policy, r=2)
        train(policy, folder, max_steps=2, **changes)
        return policy

    whole = start(tmp_path / "whole")
    LEFT[0] = {grpo: 3, ppo: 5}[train]
    with pytest.raises(Interrupted):
        start(tmp_path / "cut")
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000001"]
    resumed = start(tmp_path / "cut")
    assert resumed.fingerprint() == whole.fingerprint()
    assert {x.device for x in resumed.model.state_dict().values()} == {card.device}


def test_the_random_state_of_the_own_card_alone_is_kept(card):
    before = torch.get_rng_state()
    for device in ("cpu", "cuda:1"):
        with kept_random_state(torch.device(device)):
            torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="cuda:0 was asked for"):
        kept_random_state(torch.device("cuda:0")).__enter__()


# -- the command line ------------------------------------------------------------------------------

SMALL = ["max_steps=1", "max_completion_length=8", "per_device_train_batch_size=6"]
SMALL += ["--data", "rows.jsonl", "--reward", "mine.py:short"]
COMMANDS = {
    "grpo": ["train", *SMALL],
    "ppo": ["train", *SMALL, "value_batches=2", "--algorithm", "ppo"],
    "sft": ["sft", "max_steps=1", "max_completion_length=24", "--data", "rows.jsonl"],
    "eval": ["eval", "--limit", "2", "--sampler", "max_new_tokens=8"],
    "sample": ["sample", "--sampler", "max_new_tokens=8"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_puts_its_policy_where_it_is_told(command, mdm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mdm.save_pretrained("policy")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    named = {"eval": ["policy"], "sample": ["policy", "x"]}.get(command, ["--policy", "policy"])
    words = [*COMMANDS[command], *named]
    with FakeCard(index=0, cards=1, float64=False):
        app(words, standalone_mode=False)  # a card that there is is used
    with FakeCard(float64=False):
        app([*words, "--device", "cuda:1"], standalone_mode=False)
        with pytest.raises(RuntimeError, match="cuda was asked for"):
            app([*words, "--device", "cuda"], standalone_mode=False)
        with pytest.raises(InputError, match="cuda:2 asked, but the last of the 2 cards is cuda:1"):
            app([*words, "--device", "cuda:2"], standalone_mode=False)
    with pytest.raises(InputError, match=r"cuda asked, but this torch .* sees no card"):
        app([*words, "--device", "cuda"], standalone_mode=False)


# -- several processes -----------------------------------------------------------------------------


def test_policies_on_several_devices_are_trained_in_one_process(mdm, monkeypatch):
    accelerator_for(mdm)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    assert accelerator_for(mdm).num_processes == 1


TWO_CARDS = """
import os, sys
import torch
from accelerate import PartialState
from fake_card import FakeCard
from test_devices import TRAININGS, grpo, ppo, sft
from mdmrl import load_policy

folder, output = sys.argv[1:]
with FakeCard(index=int(os.environ["LOCAL_RANK"])) as card:
    for name, train in {"grpo": grpo, "ppo": ppo, "sft": sft}.items():
        for max_steps in (1, 2):  # the second run goes on from the first one's checkpoint
            policy = load_policy(folder)
            train(policy, f"{output}/{name}", max_steps=max_steps)
        assert {x.device for x in policy.model.state_dict().values()} == {card.device}
        sys.stdout.write(f"weights {name} {policy.fingerprint()}\\n")  # in one write
"""


@pytest.mark.slow
def test_each_of_two_processes_stays_on_its_own_card(mdm, tmp_path):
    mdm.save_pretrained(tmp_path / "policy")
    (tmp_path / "script.py").write_text(TWO_CARDS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *(tmp_path / "script.py", tmp_path / "policy", tmp_path / "runs"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(found) == 6 and len(set(found)) == 3


@pytest.mark.parametrize("way", ["DEEPSPEED", "MEGATRON_LM"])
def test_weights_are_not_shared_out_in_silence(ar, monkeypatch, way):
    """What `accelerate launch --use_deepspeed` and its like set."""
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "True")
    with pytest.raises(InputError, match=rf"{way}: .*--use_fsdp --fsdp_version 2"):
        accelerator_for(ar)


def test_fsdp_is_of_version_2_and_for_every_weight(ar, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"FSDP_VERSION=1: expected 2"):
        accelerator_for(ar)
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator_for(ar)
    assert ar.sharding is None  # one process has nothing to share out
    with pytest.raises(InputError, match=r"FSDP with an adapter"):
        accelerator_for(add_lora(ar, r=2))
