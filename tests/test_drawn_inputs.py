"""Settings and rows drawn at random, most of them wrong: each is taken as it is and works, or is
refused by an error of ours that names it; no traceback of a library's, no other value instead.

The draws are seeded, so that a failure is the same everywhere."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from conftest import parity

from mdmrl import (
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    SFTConfig,
    generate,
    train_dpo,
    train_grpo,
    train_sft,
)
from mdmrl.config import InputError
from mdmrl.rewards.protocol import check_rewards, reward_values
from mdmrl.rl.kl import kl_form
from mdmrl.rl.rejection import RFTConfig
from mdmrl.sampling import SamplerConfig
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.training.supervised import encode_pairs
from mdmrl.zoo.recipes import PretrainConfig

NAN, INF = math.nan, math.inf
NUMBERS = [-INF, -(10**400), -1, -0.5, 0, 5e-324, 1e-40, 1e-5, 0.5, 1, 1.0, 2, 3, 4, 2.5, 8, 12]
NUMBERS += [1e308, 2**53 + 1, 10**30, 10**400, INF, NAN]
OF_LIBRARIES = [np.int64(2), np.float32(0.5), np.float64(NAN), np.bool_(True), np.array(4)]
OF_LIBRARIES += [np.array([1, 2]), np.array(None), torch.tensor(1), torch.tensor([0.5])]
TEXTS = ["", "a", "4", " 4 ", "1e-3", "9007199254740993", "1e999", "nan", "True", "\0", "\ud800"]
OTHERS = [None, True, False, b"4", 1j, object(), int, len, [], [1], [NAN], ["a"], [None], [[1]]]
OTHERS += [(1, 3), range(2), {}, {"steps": 2}, {"steps": 3.5}, {"step": 2}, {3: 1}, {True: 0}]
ODD = NUMBERS + OF_LIBRARIES + TEXTS + OTHERS
CONFIGS = [SamplerConfig, GRPOConfig, PPOConfig, SFTConfig, DPOConfig, RFTConfig, PretrainConfig]


def drawn_settings(made, seed, count):
    """Each setting with something odd, then several at once; what is good is drawn more often."""
    rng, names = (
        random.Random(f"{made.__name__} {seed}"),
        [f.name for f in dataclasses.fields(made)],
    )
    for number in range(count):
        few = 1 if number < count // 2 else rng.choice((2, 3))
        yield {name: rng.choice(ODD) for name in rng.sample(names, few)}


def nests(given):
    return isinstance(given.get("sampler"), dict)


def is_same(found, given):
    """Whether a setting of a config says what was given, whatever type that had."""
    if isinstance(found, bool) or isinstance(given, bool | np.bool_) or found is None:
        return str(found) == str(given)
    if isinstance(found, int) and isinstance(given, str):
        return found == int(given) if given.strip().isdigit() else found == float(given)
    if isinstance(found, float):
        return found == float(given)
    if isinstance(found, list):
        return all(map(is_same, found, given))
    if isinstance(found, dict):
        return all(is_same(found[name], given[name]) for name in found)
    return found == given


@pytest.mark.parametrize("made", [*CONFIGS, GuideConfig])
def test_a_setting_is_taken_as_it_is_or_refused_by_name(made):
    taken = 0
    for given in drawn_settings(made, 0, 300):
        try:
            config = made.from_dict(given)
        except InputError as error:
            named = [*given, *given.get("sampler", ())] if nests(given) else given
            assert any(str(name) in str(error) for name in named), (given, error)
        else:
            taken += 1
            for name, value in given.items():
                assert is_same(getattr(config, name), value), (name, value, config)
            assert made.from_dict(config.to_dict()) == config
    assert taken > 10
    for name in ("nonsense", 3, True, None, "\ud800"):
        with pytest.raises(InputError, match="key"):
            made.from_dict({name: 1})
    for given in (None, 3, "steps", [("steps", 3)]):
        with pytest.raises(InputError, match="settings by name"):
            made.from_dict(given)


def test_a_sampler_that_is_taken_draws(shared_policies):
    """Numbers at the ends of what float32 holds are the sampler's."""
    rng, drawn = random.Random(0), 0
    own = {
        "temperature": [0, 1e-30, 0.5, 1, 1e30, 1e-300, 1e308],
        "cfg_scale": [0, 1e-30, 1, 1e308],
    }
    own |= {"top_p": [1, 1e-30, 0.5, 1e-300], "threshold": [None, 1e-30, 0.5, 1, 1e-300]}
    own |= {
        "order_temperature": [0, 1e-30, 1, 1e30, 1e-300],
        "entropy_bound": [None, 0, 1e-30, 1e30],
    }
    own |= {
        "top_k": [None, 1, 5, 2**62],
        "revise": [0, 1, 2**62],
        "cache_refresh": [None, 1, 2**62],
    }
    own |= {"steps": [None, 1, 4], "block_length": [None, 2, 4], "cache": [None, "prefix", "dual"]}
    own |= {"remasking": ["state_confidence", "margin", "random"], "end_last": [True, False]}
    for _ in range(80):
        given = {
            name: rng.choice(own[name]) for name in rng.sample([*own], rng.choice((1, 2, 3, 4)))
        }
        policy = shared_policies[rng.choice(("mdm", "mdm", "bd", "ar"))]
        try:
            output = generate(policy, ["x"], SamplerConfig(max_new_tokens=4, **given))
        except InputError as error:
            assert any(name in str(error) for name in given), (given, error)
        else:
            drawn += 1
            assert output.completion_ids.shape[1] <= 4
            assert not output.logprobs.isnan().any(), given
    assert drawn > 20


MESSAGES = [[], [3], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}]]
MESSAGES += [[{"role": "user", "content": x}] for x in (None, 3, "", "\ud800", [3], "so <|end|>")]
MESSAGES += [{"role": "user", "content": "x"}, ({"role": "user", "content": "x"},)]
NO_PROMPTS = [
    None,
    3,
    NAN,
    True,
    b"x",
    "",
    "\ud800",
    "<|mask|>",
    {},
    object(),
    "x" * 999,
    *MESSAGES,
]
NO_COMPLETIONS = [x for x in NO_PROMPTS if x not in ("", "<|mask|>")]
PROMPTS = ["x", "a\0b", np.str_("x"), [{"role": "user", "content": "x"}]]
PROMPTS += [[{"role": "system", "content": ""}, {"role": "user", "content": "x"}]]
NO_ROWS = [None, 3, "ab", [], {"prompt": "x"}, [3], [None], ["prompt"], [{}], [("prompt", "x")]]


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=range(len(NO_PROMPTS)))
def test_what_is_no_prompt_is_refused(ar, prompt):
    for use in (
        lambda: generate(ar, ["fine", prompt], SamplerConfig(max_new_tokens=2)),
        lambda: encode_pairs(ar, [{"prompt": prompt, "completion": "x"}], 8),
    ):
        with pytest.raises(InputError, match=r"^(a prompt|prompt [01]|row 1, prompt,) "):
            use()


def test_a_prompt_works_whatever_it_is_made_of(ar):
    for prompt in PROMPTS:
        assert len(generate(ar, [prompt], SamplerConfig(max_new_tokens=2)).completions) == 1
        assert encode_pairs(ar, [{"prompt": prompt, "completion": ""}], 8)


@pytest.mark.parametrize("completion", NO_COMPLETIONS, ids=range(len(NO_COMPLETIONS)))
def test_what_is_no_completion_is_refused(ar, completion):
    with pytest.raises(InputError, match=r"^row 1[,:]"):
        encode_pairs(ar, [{"prompt": "x", "completion": completion}], 8)


def test_what_are_no_rows_is_refused_before_any_work(ar, tmp_path):
    small = {"max_steps": 1, "max_completion_length": 4, "output_dir": str(tmp_path / "run")}
    row = {"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z"}
    grpo = GRPOConfig(num_generations=2, per_device_train_batch_size=2, **small)
    ways = {
        "grpo": lambda *rows: train_grpo(ar, [parity], rows[0], grpo, *rows[1:]),
        "sft": lambda *rows: train_sft(ar, rows[0], SFTConfig(**small), *rows[1:]),
        "dpo": lambda *rows: train_dpo(ar, rows[0], DPOConfig(**small), *rows[1:]),
    }
    for train in ways.values():
        for rows in NO_ROWS:
            with pytest.raises(InputError, match="row"):
                train(rows)
            if rows not in ([], [{}]):  # none are held out; pairs are those that have a choice
                with pytest.raises(InputError, match="row"):
                    train([row], rows)
    for name, column in (("sft", "completion"), ("dpo", "chosen"), ("dpo", "rejected")):
        with pytest.raises(InputError, match="row 2 has the fields"):
            ways[name]([row, {k: v for k, v in row.items() if k != column}])
    with pytest.raises(InputError, match="column 3"):
        ways["grpo"]([row, row | {3: 1}])
    assert not (tmp_path / "run").exists()


FOUND = [None, 3, "ab", [1], [1, 2, 3], {1: 1, 2: 2}, {1, 2}, iter([1, 2]), torch.ones(2, 2)]
FOUND += [[1, x] for x in (NAN, INF, True, np.bool_(1), 10**400, "1", 1j, [1], b"1", object())]
FOUND += [np.array(["a", "b"]), torch.tensor([1, 2j]), [1, torch.tensor([1.0])]]


def test_what_a_reward_returns_is_a_list_of_numbers_or_refused():
    def values(found):
        def mine(**columns):
            return found

        return (
            reward_values([mine], ["p", "q"], ["a", "b"], [[1], [2]], [{}, {}]).flatten().tolist()
        )

    for found in FOUND:
        with pytest.raises(InputError, match=r"^reward 'mine' returned "):
            values(found)
    for found in ([1, 2], (1.0, 2), np.array([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True)):
        assert values(found) == [1, 2]
    assert values([np.float32(1), torch.tensor(2)]) == [1, 2]
    for weights in ([1], [1, None], [1, "2"], [1, NAN], [1, 10**400], 3, "ab", [True, 1]):
        with pytest.raises(InputError, match="reward_weights="):
            check_rewards([parity, len], weights)


@pytest.mark.parametrize("own", [len, torch.mean, lambda d: d[:, :1], lambda d: None])
def test_a_kl_of_ones_own_has_a_value_for_each_token(own):
    with pytest.raises(InputError, match=r"kl_estimator=.* gives .*expected a tensor, \(2, 3\)"):
        kl_form(own)(torch.ones(2, 3))
    assert kl_form(torch.square)(torch.ones(2, 3)).shape == (2, 3)
