"""Settings and rows drawn by Hypothesis, most of them wrong: each is taken as it is and works, or
is refused by an error of ours that names it; no traceback of a library's, no other value instead.

The draws derive from the tests themselves, so that a failure is the same everywhere."""

import dataclasses
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import parity
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmrl import (
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    SFTConfig,
    evaluate,
    generate,
    load_rows,
    train_dpo,
    train_grpo,
    train_ppo,
    train_sft,
)
from mdmrl.config import InputError
from mdmrl.rewards.protocol import check_rewards, reward_values
from mdmrl.rl.kl import kl_form
from mdmrl.rl.rejection import RFTConfig, train_rft
from mdmrl.runs import as_json
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
repeatable = partial(settings, derandomize=True, deadline=None, database=None)
DRAWN = st.integers(1, 8) | st.floats(0, 1) | st.sampled_from([None, True, False])  # often good
DRAWN |= st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
DRAWN |= st.lists(st.integers() | st.floats(width=16) | st.text(max_size=2), max_size=3)


def some_of(strategies, most=2):
    """Dictionaries of some names, each with a value of its strategy."""
    names = st.lists(st.sampled_from([*strategies]), min_size=1, max_size=most, unique=True)
    return names.flatmap(lambda few: st.fixed_dictionaries({n: strategies[n] for n in few}))


def nests(wanted):
    return isinstance(wanted.get("sampler"), dict)


def is_same(found, wanted):
    """Whether a setting of a config says what was given, whatever type that had."""
    if found in ("group", "none") and isinstance(wanted, bool | np.bool_):  # TRL's scale_rewards
        return (found == "group") == wanted
    if isinstance(found, bool) or isinstance(wanted, bool | np.bool_) or found is None:
        return str(found) == str(wanted)
    if isinstance(found, int) and isinstance(wanted, str):
        return found == int(wanted) if wanted.strip().isdigit() else found == float(wanted)
    if isinstance(found, float):
        return found == float(wanted)
    if isinstance(found, list):
        return all(map(is_same, found, wanted))
    if isinstance(found, dict):
        return all(is_same(found[name], wanted[name]) for name in found)
    return found == wanted


@pytest.mark.parametrize("made", [*CONFIGS, GuideConfig])
def test_a_setting_is_taken_as_it_is_or_refused_by_name(made):
    taken = 0

    @repeatable(max_examples=300)
    @given(some_of({field.name: DRAWN for field in dataclasses.fields(made)}))
    def check(drawn):
        nonlocal taken
        try:
            config = made.from_dict(drawn)
        except InputError as error:
            named = [*drawn, *drawn.get("sampler", ())] if nests(drawn) else drawn
            assert any(str(name) in str(error) for name in named), error
        else:
            taken += 1
            for name, value in drawn.items():
                assert is_same(getattr(config, name), value), (name, config)
            if not any(map(callable, drawn.values())):  # of which only the name is written
                assert made.from_dict(config.to_dict()) == config

    check()
    assert taken > 10
    for name in ("nonsense", 3, True, None, "\ud800"):
        with pytest.raises(InputError, match="key"):
            made.from_dict({name: 1})
    for wrong in (None, 3, "steps", [("steps", 3)]):
        with pytest.raises(InputError, match="settings by name"):
            made.from_dict(wrong)


def test_a_sampler_that_is_taken_draws(shared_policies):
    """Numbers at the ends of what float32 holds are the sampler's."""
    own = {
        "temperature": [0, 1e-30, 0.5, 1, 1e30, 1e-300, 1e308],
        "cfg_scale": [0, 1e-30, 1, 1e308],
        "top_p": [1, 1e-30, 0.5, 1e-300],
        "threshold": [None, 1e-30, 0.5, 1, 1e-300],
        "order_temperature": [0, 1e-30, 1, 1e30, 1e-300],
        "entropy_bound": [None, 0, 1e-30, 1e30],
        "top_k": [None, 1, 5, 2**62],
        "revise": [0, 1, 2**62],
        "cache_refresh": [None, 1, 2**62],
        "steps": [None, 1, 4],
        "block_length": [None, 2, 4],
        "cache": [None, "prefix", "dual"],
        "remasking": ["state_confidence", "margin", "random"],
        "end_last": [True, False],
    }
    texts = 0

    @repeatable(max_examples=80)
    @given(
        some_of({name: st.sampled_from(values) for name, values in own.items()}, most=4),
        st.sampled_from(["mdm", "bd", "ar"]),
    )
    def check(drawn, kind):
        nonlocal texts
        try:
            config = SamplerConfig(max_new_tokens=4, **drawn)
            output = generate(shared_policies[kind], ["x"], config)
        except InputError as error:
            assert any(name in str(error) for name in drawn), error
        else:
            texts += 1
            assert output.completion_ids.shape[1] <= 4
            assert not output.logprobs.isnan().any()

    check()
    assert texts > 20


MESSAGES = [[], [3], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}]]
MESSAGES += [[{"role": "user", "content": x}] for x in (None, 3, "", "\ud800", [3], "so <|end|>")]
MESSAGES += [[{"role": "user", "content": [part]}] for part in ("x", {}, {"type": "image"})]
MESSAGES += [[{"role": "mask", "content": "x"}]]
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


def test_parts_of_a_content_are_one_text(ar):
    parts = [{"type": "text", "text": text} for text in ("What is ", "fever?")]
    found = ar.token_lists([[{"role": "user", "content": parts}]])
    assert found == ar.token_lists(["What is fever?"])


def test_a_template_that_refuses_a_conversation_is_an_error_of_ours(ar):
    for template in ("{{ raise_exception('no system') }}", "{{ x.y.z }}", "{% for %}"):
        ar.tokenizer.chat_template = template
        with pytest.raises(InputError, match=r"^the chat template refuses a conversation \("):
            ar.token_lists(["x"])


def test_a_prompt_works_whatever_it_is_made_of(ar):
    for prompt in PROMPTS:
        assert len(generate(ar, [prompt], SamplerConfig(max_new_tokens=2)).completions) == 1
        assert encode_pairs(ar, [{"prompt": prompt, "completion": ""}], 8)


@pytest.mark.parametrize("completion", NO_COMPLETIONS, ids=range(len(NO_COMPLETIONS)))
def test_what_is_no_completion_is_refused(ar, completion):
    with pytest.raises(InputError, match=r"^row 1[,:]"):
        encode_pairs(ar, [{"prompt": "x", "completion": completion}], 8)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)
ANY_TEXT = st.text(max_size=8) | st.sampled_from(MESSAGES) | ANY_JSON
ANY_ROW = st.fixed_dictionaries(
    {"prompt": ANY_TEXT, "completion": ANY_TEXT}, optional={"x": ANY_JSON}
)


def test_rows_of_a_file_are_taken_as_they_are_or_refused_by_number(ar, tmp_path):
    file, taken = tmp_path / "rows.jsonl", 0

    @repeatable(max_examples=200)
    @given(st.lists(ANY_ROW | ANY_JSON, min_size=1, max_size=3))
    def check(drawn):
        nonlocal taken
        file.write_text("".join(json.dumps(row) + "\n" for row in drawn), encoding="utf-8")
        try:
            rows = load_rows(file)
            pairs = encode_pairs(ar, rows, 64)
        except InputError as error:
            assert re.search(r"rows\.jsonl:[123]|row [123]|prompt [012]", str(error)), error
        else:
            taken += 1
            assert as_json(rows) == as_json(drawn) and len(pairs) == len(rows)

    check()
    assert taken > 10


@pytest.mark.parametrize("line", ["[" * 10**5, "1" * 10**4, "{", '{"a": 1} {}', "\ufeff{}"])
def test_a_line_that_is_no_json_is_refused_by_number(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: no JSON"):
        load_rows(file)


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


BRINGS = {"metric": [3, "yes", lambda text: True, lambda text, row: "yes", lambda text, row: 0.5]}
BRINGS["metric"] += [lambda text, row: torch.ones(2)]
BRINGS["probe"] = [
    3,
    lambda: {},
    lambda policy: None,
    lambda policy: {"x": "y"},
    lambda policy: [1],
]
BRINGS["watch"] = ["x", lambda texts, ids: None, lambda texts, ids: {"x": None, "y": [1]}]
BRINGS["draw"] = [3, lambda prompts: prompts, lambda *given: None, lambda *given: "text"]
BRINGS["draw"] += [lambda policy, prompts, *more: generate(policy, prompts[:1], *more)]
ESTIMATORS = [lambda p, r, n: None, lambda p, r, n: 0.0, lambda p, r, n: torch.zeros(2, 9)]
ODDITIES = [(name, odd) for name, odds in BRINGS.items() for odd in odds]
ODDITIES += [("logp_estimator", odd) for odd in ESTIMATORS]


@pytest.mark.parametrize(("name", "odd"), ODDITIES, ids=range(len(ODDITIES)))
def test_what_a_user_brings_gives_what_it_should_or_is_refused(mdm, tmp_path, name, odd):
    small = {"max_steps": 1, "max_completion_length": 4, "output_dir": str(tmp_path / "run")}
    own = {"logp_estimator": odd if name == "logp_estimator" else "one_step"}
    config = GRPOConfig(num_generations=2, per_device_train_batch_size=2, **own, **small)
    brought = {} if name == "logp_estimator" else {name: odd}
    with pytest.raises(InputError, match=r"expected (a|numbers|True|one) ?"):
        train_grpo(mdm, [parity], ROWS, config, ROWS_APART, **brought)


ROWS, ROWS_APART = [{"prompt": "x"}], [{"prompt": "y"}]


def test_what_is_no_sampler_config_is_refused(ar):
    for config in ({"max_new_tokens": 2}, "greedy", 3, SamplerConfig, GRPOConfig()):
        with pytest.raises(InputError, match=r"^config=.*: expected a SamplerConfig"):
            generate(ar, ["x"], config)


def test_what_is_no_policy_and_no_config_is_refused(mdm, tmp_path):
    rows = [{"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z"}]
    ways = {GRPOConfig: train_grpo, PPOConfig: train_ppo, RFTConfig: train_rft}
    ways = {made: partial(train, rewards=[parity]) for made, train in ways.items()}
    ways |= {SFTConfig: train_sft, DPOConfig: train_dpo}
    for made, train in ways.items():
        for policy in ("tiny-mdm", None, mdm.model):
            with pytest.raises(InputError, match=r"^policy=.*expected a policy"):
                train(policy, rows=rows, config=made())
        for config in ({"max_steps": 1}, None, made, SamplerConfig()):
            with pytest.raises(InputError, match=rf"^config=.*expected a {made.__name__}"):
                train(mdm, rows=rows, config=config)


@pytest.mark.parametrize("rows", [[{"x": 1}], [3], [None]])
def test_what_is_no_row_is_not_evaluated(mdm, rows):
    with pytest.raises(InputError, match=r"row 0, .*expected a dict with 'prompt'"):
        evaluate(mdm, rows, SamplerConfig(max_new_tokens=4))
    with pytest.raises(InputError, match="batch_size=0"):
        evaluate(mdm, ROWS, SamplerConfig(max_new_tokens=4), batch_size=0)
    with pytest.raises(InputError, match=r"row 0, .*expected a dict with 'prompt'|row 1 is"):
        pairs = [{"prompt": "x", "chosen": "y", "rejected": "z"}]
        train_dpo(mdm, pairs, DPOConfig(max_completion_length=4), rows)
