"""TRL's reward protocol: what rewards get, may return, and how they are summed; TRL's own, run."""

import asyncio
import importlib.util
import math
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mdmrl.config import InputError
from mdmrl.rewards import (
    RewardLog,
    check_rewards,
    complete_rows,
    medical_rewards,
    reward_name,
    reward_values,
    total_reward,
)
from mdmrl.rewards.medical import Accuracy
from mdmrl.rewards.protocol import GIVEN, Masking

NAN = math.nan
TEXTS, IDS = ["a", "b", "c"], [[1], [2, 3], [3]]
ROWS = [{"prompt": "q", "Answer": str(i), "note": i} for i in range(3)]


def length(prompts, completions, completion_ids, **columns):
    return [-len(ids) / 10 for ids in completion_ids]


def values_of(*rewards, rows=ROWS, prompts=("q",) * 3, **offered):
    return reward_values(rewards, prompts, TEXTS, IDS, rows, **offered)


def returning(found):
    def culprit(**columns):
        return found

    return culprit


# -- what rewards get ------------------------------------------------------------------------------


def test_rewards_get_everything_by_name():
    seen = {}

    def curious(prompts, completions, completion_ids, Answer, **others):
        seen.update(locals())
        return [None, 2, 0.5]

    rows = [{**row, "completion": "learnt"} for row in ROWS]
    found = values_of(length, curious, rows=rows)
    expected = torch.tensor([[-0.1, NAN], [-0.2, 2], [-0.1, 0.5]]).double()
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.device.type == "cpu"
    assert seen["prompts"] == ["q"] * 3
    assert seen["completions"] == TEXTS
    assert seen["completion_ids"] == IDS
    assert seen["Answer"] == ["0", "1", "2"]
    assert seen["others"]["note"] == [0, 1, 2]
    # TRL's trainer keeps these two to itself.
    assert not {"prompt", "completion"} & seen["others"].keys()
    state = seen["others"]["trainer_state"]
    assert (state.global_step, state.max_steps) == (0, 0)


def test_the_columns_are_those_of_all_rows():
    """A column that the first row of a batch lacks is one all the same, and one that no row of the
    batch has, where another row has it."""

    def hinted(completions, hint, **columns):
        return [0.0 if h is None else 1.0 for h in hint]

    rows = [{"prompt": "q", **({"hint": "h"} if i % 3 == 2 else {})} for i in range(6)]
    assert values_of(hinted, rows=rows[:3]).flatten().tolist() == [0, 0, 1]
    complete = complete_rows(rows)
    assert [row["hint"] for row in complete] == [None, None, "h"] * 2
    assert values_of(hinted, rows=[complete[0], *complete[3:5]]).flatten().tolist() == [0, 0, 0]
    assert check_rewards([hinted], rows=rows) == ["hinted"]


def test_rows_that_lack_nothing_stay_the_same():
    complete = complete_rows(ROWS)
    assert all(a is b for a, b in zip(complete, ROWS, strict=True))
    filled = complete_rows([{"prompt": "q", "a": 1}, {"b": 2, "prompt": "p"}])
    assert filled == [{"prompt": "q", "a": 1, "b": None}, {"prompt": "p", "a": None, "b": 2}]


@pytest.mark.parametrize("name", GIVEN)
def test_reserved_columns_are_refused(name):
    rows = [{"prompt": "q"}, {"prompt": "q", name: 1}]
    for refused in (complete_rows, lambda rows: check_rewards([length], rows=rows)):
        with pytest.raises(InputError, match=f"column '{name}': .*rename it"):
            refused(rows)


@pytest.mark.parametrize("row", [{"question": "q"}, "q", None])
def test_a_row_without_a_prompt_is_named(row):
    with pytest.raises(InputError, match=r"row 1, .*expected a dict with 'prompt'"):
        complete_rows([{"prompt": "q"}, row])


def test_message_prompts_get_message_completions():
    seen = []

    def curious(completions, **columns):
        seen.extend(completions)
        return [0.0] * 3

    prompts = [[{"role": "user", "content": "q"}]] * 3
    values_of(curious, prompts=prompts)
    assert seen == [[{"role": "assistant", "content": text}] for text in TEXTS]


def test_what_rewards_report_is_taken_down():
    def reporting(completions, log_metric, log_extra, trainer_state, **columns):
        log_metric("long", len(completions))
        log_metric("long", np.float32(1.0))
        log_extra("seen", completions)
        log_extra("seen", ["more"])
        share = trainer_state.global_step / trainer_state.max_steps
        return [share] * len(completions)

    log = RewardLog(global_step=3, max_steps=4)
    assert values_of(reporting, **log.offered).flatten().tolist() == [0.75] * 3
    assert log.metrics() == {"long": 2.0}
    assert log.extras == {"seen": [*TEXTS, "more"]}


def test_what_a_reward_reports_has_a_name_of_its_own():
    log = RewardLog()
    report, extra = log.offered["log_metric"], log.offered["log_extra"]
    for name, value in (("x", "many"), ("x", None), ("x", [1.0]), (3, 1.0), ("x", 10**400)):
        with pytest.raises(InputError, match=r"log_metric\(.*expected a name and a number"):
            report(name, value)
    for column in ("step", "prompt", "completions", "rewards"):
        with pytest.raises(InputError, match=rf"log_extra\('{column}'.*rename it"):
            extra(column, TEXTS)
    for column, values in (("x", "abc"), ("x", None), ("x", 3), (3, TEXTS)):
        with pytest.raises(InputError, match=r"log_extra\(.*expected a .*list"):
            extra(column, values)
    for value in (1, True, math.nan, torch.tensor(2.0)):
        report("own", value)
    assert log.beside({"loss": 1.0}) == {"own": None, "loss": 1.0}
    with pytest.raises(InputError, match="log_metric of own: the log has its own by this name"):
        log.beside({"own": 1.0})
    with pytest.raises(InputError, match="log_metric of own"):
        log.beside({}, "own")


def test_where_a_reward_fails_it_can_abstain():
    def broken(completions, **columns):
        return [1.0, math.nan, "2"]

    def raising(completions, **columns):
        raise KeyError("answer")

    async def short(completions, **columns):
        return [1.0]

    for reward, expected, share in (
        (broken, [1.0, None, None], 2 / 3),
        (raising, [None] * 3, 1),
        (short, [None] * 3, 1),
    ):
        log, name = RewardLog(), reward.__name__
        with pytest.warns(UserWarning, match=rf"reward '{name}' failed for \d of 3 .*masked"):
            found = values_of(Masking(reward), **log.offered)
        assert [None if x != x else x for x in found.flatten().tolist()] == expected
        assert log.metrics() == {f"rewards/{name}/failed": pytest.approx(share)}
    log = RewardLog()
    assert values_of(Masking(length), **log.offered).tolist() == values_of(length).tolist()
    assert log.metrics() == {"rewards/length/failed": 0}


def test_a_reward_cannot_change_what_the_next_one_gets():
    def greedy(prompts, completions, completion_ids, note, **columns):
        for items in (prompts, completions, completion_ids, note):
            items.clear()
        return [0.0] * 3

    assert values_of(greedy, length)[:, 1].tolist() == [-0.1, -0.2, -0.1]


# -- what they may return --------------------------------------------------------------------------

ACCEPTED = {
    "a list": [1, None, 0.5],
    "a tuple": (1.0, None, 0.5),
    "numpy's numbers": [np.float32(1), None, np.float64(0.5)],
    "torch's numbers": [torch.tensor(1), None, torch.tensor(0.5)],
}


@pytest.mark.parametrize("found", ACCEPTED.values(), ids=ACCEPTED)
def test_what_a_reward_may_return(found):
    assert values_of(returning(found)).flatten().nan_to_num(-1).tolist() == [1, -1, 0.5]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_an_array_is_a_list(kind):
    assert values_of(returning(kind([1.0, 2.0, 0.5]))).flatten().tolist() == [1, 2, 0.5]


@pytest.mark.parametrize("inside", [False, True])
def test_an_async_reward_is_awaited_in_a_notebook_too(inside):
    async def judge(completions, **columns):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    async def notebook():
        return values_of(judge)

    found = asyncio.run(notebook()) if inside else values_of(judge)
    assert found.flatten().tolist() == [2, 2, 2]


REFUSED = {
    "too short": ([1.0, 2.0], "returned 2: expected a list of 3 values"),
    "too long": ([1.0] * 4, "returned 4: expected a list of 3 values"),
    "a bool": ([1.0, True, 0.0], r"True \(bool\) for completion 1"),
    "numpy's bool": ([1.0, np.True_, 0.0], r"True_?\)? \(bool\w*\) for completion 1"),
    "not a number": ([1.0, 0.0, NAN], r"nan \(float\) for completion 2"),
    "infinite": ([math.inf, 0.0, 1.0], r"inf \(float\) for completion 0"),
    "numpy's infinite": (np.array([0.0, -np.inf, 1.0]), r"\(float64\) for completion 1"),
    "a string": (["1", 0.0, 1.0], r"'1' \(str\) for completion 0"),
    "text": ("abc", r"'a' \(str\) for completion 0"),
    "bytes": (b"abc", "returned bytes: expected a list of 3 values"),
    "a column": (torch.ones(3, 1), "returned Tensor: expected a list of 3 values"),
    "tensors that are no numbers": ([torch.ones(1)] * 3, r"\(Tensor\) for completion 0"),
    "a dict": ({0: 1.0, 1: 1.0, 2: 1.0}, "returned dict"),
    "nothing": (None, "returned NoneType"),
    "one number": (1.0, "returned float"),
}


@pytest.mark.parametrize(("found", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_reward_may_not_return(found, message):
    with pytest.raises(InputError, match=message) as info:
        values_of(length, returning(found))
    assert "'culprit'" in str(info.value)


def test_a_reward_that_raises_is_named():
    def culprit(completions, **columns):
        return [1 / 0 for _ in completions]

    with pytest.raises(ZeroDivisionError) as info:
        values_of(culprit)
    assert "culprit" in "".join(traceback.format_exception(info.value))
    assert info.value.__notes__ == ["raised by the reward 'culprit'"]


# -- how they are summed ---------------------------------------------------------------------------


def test_only_what_abstains_is_left_out():
    """One reward is for rows of kind a, the other for those of kind b: each row has one of them."""
    values = torch.tensor([[1.0, NAN], [NAN, 2.0], [3.0, 4.0], [NAN, NAN]]).double()
    assert total_reward(values)[:3].tolist() == [1, 2, 7]
    assert total_reward(values, [0.5, 2])[:3].tolist() == [0.5, 4, 9.5]
    assert total_reward(values, [0.0, 1.0])[:3].tolist() == [0, 2, 4]
    assert total_reward(values).isnan().tolist() == [False, False, False, True]


def test_a_sum_of_rewards_that_all_speak_has_the_same_bits():
    values = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(total_reward(values), values.sum(1))
    assert torch.equal(total_reward(values, [1.0] * 5), values.sum(1))


# -- what is checked before the first completion ---------------------------------------------------


def test_rewards_have_names():
    rewards = [length, partial(returning([0]), weight=1), *medical_rewards()]
    assert check_rewards(rewards, [1, 0.5, 2, 0, -1], ROWS) == [
        "length",
        "culprit",
        "accuracy",
        "depth",
        "format",
    ]
    assert reward_name(Accuracy(answer_only=True)) == "answer_accuracy"


NO_REWARDS = {
    "a function": (length, "rewards=length: expected a list of functions"),
    "a callable object": (Accuracy(), "rewards=accuracy: expected a list"),
    "text": ("length", "rewards='length': expected a list"),
    "none": ([], "no reward functions given: expected a list"),
    "a number": ([length, 3], r"reward 3 \(int\): expected a function"),
    "a name": (["my_rewards.py:short"], r"reward my_rewards.py:short \(str\): expected a"),
    "a class": ([Accuracy], r"'mdmrl.rewards.medical.Accuracy'> \(type\): expected .* an object"),
    "a model": ([torch.nn.Linear(2, 1)], r"\(Linear\): expected a function"),
    "twins": ([length, partial(length, weight=1)], "two rewards share a name: length"),
}


@pytest.mark.parametrize(("rewards", "message"), NO_REWARDS.values(), ids=NO_REWARDS)
def test_what_are_no_rewards(rewards, message):
    with pytest.raises(InputError, match=message):
        check_rewards(rewards)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, NAN]])
def test_weights_are_one_number_a_reward(weights):
    with pytest.raises(InputError, match=r"reward_weights=\[1.0.*: expected a number for each of"):
        check_rewards([length, Accuracy()], weights)


def test_a_reward_that_cannot_be_called_is_found_before_the_first_rollout():
    def needy(completions, hint, **columns):
        return completions

    def narrow(prompts, completions, completion_ids=None):
        return completions

    with pytest.raises(InputError, match=r"'needy': missing .*'hint'; it is called with"):
        check_rewards([length, needy], rows=ROWS)
    with pytest.raises(InputError, match=r"'narrow': .*'trainer_state'.* as \*\*columns"):
        check_rewards([narrow], rows=ROWS)


# -- TRL's own -------------------------------------------------------------------------------------

SOLUTIONS = [r"\frac{1}{3}", r"\frac{1}{3}", "no formula at all", r"\frac{1}{3}"]
WRITTEN = [
    "<think>\nThree.\n</think>\nIt is \\boxed{\\frac{1}{3}}",
    r"It is \boxed{\frac{1}{2}}",
    r"<think></think>\boxed{1}",
    "nothing",
]


@pytest.fixture(scope="module")
def trl():
    from trl import rewards

    return rewards


def test_rewards_of_trl_run(trl):
    log = RewardLog()
    rewards = [
        trl.accuracy_reward,
        trl.think_format_reward,
        trl.reasoning_accuracy_reward,
        trl.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4),
        trl.get_repetition_penalty_reward(ngram_size=2),
        trl.get_cosine_scaled_reward(max_len=10),
    ]
    rows = [{"prompt": [{"role": "user", "content": "?"}], "solution": s} for s in SOLUTIONS]
    names = check_rewards(rewards, rows=complete_rows(rows))
    assert names[0] == "accuracy_reward"
    assert names[3] == "soft_overlong_punishment_reward"
    prompts = [row["prompt"] for row in rows]
    ids = [[1, 2, 3], [1] * 8, [1] * 10, [1] * 11]
    values = reward_values(rewards, prompts, WRITTEN, ids, rows, **log.offered)
    accuracy, think, reasoning, overlong, repeats, cosine = values.T.tolist()
    assert [accuracy[0], accuracy[1], accuracy[3]] == [1, 0, 0]
    assert math.isnan(accuracy[2])  # it abstains from a solution that is none
    assert think == [1, 0, 1, 0]
    assert [reasoning[0], reasoning[1], reasoning[3]] == [1, 0, 0]
    assert overlong == [0, -0.5, -1, -1]
    assert repeats == pytest.approx([0, -6 / 7, -8 / 9, -9 / 10])
    assert cosine[0] == pytest.approx(0.5 + 0.25 * (1 + math.cos(0.3 * math.pi)))
    assert total_reward(values[:, :2]).tolist() == [2, 0, 1, 0]
    assert log.extras["solution"][:4] == SOLUTIONS
    assert len(log.extras["gold_parsed"]) == 8  # of two rewards


def test_what_is_offered_is_what_trl_offers():
    """Its trainer is read, not run: the names of the keyword arguments it adds to the columns."""
    package = importlib.util.find_spec("trl").origin
    source = Path(package).with_name("trainer").joinpath("grpo_trainer.py").read_text()
    for name in GIVEN:
        assert (
            f'reward_kwargs["{name}"]' in source
            or f"{name}={name}" in source
            or (f"{name}={name}_list" in source)
        )
    assert 'not in ["prompt", "completion", "completion_ids"]' in source
