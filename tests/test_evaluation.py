"""Evaluation: what counts is averaged, what completions look like, and the table of both."""

import math

import numpy as np
import pytest
import torch

from mdmrl.config import InputError
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.evaluation.completions import completion_metrics
from mdmrl.evaluation.stats import wilson_interval
from mdmrl.evaluation.tables import evaluation_table, print_table
from mdmrl.rewards import RewardLog
from mdmrl.rewards.text import TAGS, repetition
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.tasks import Task, load_task
from mdmrl.tasks.base import MASKED
from mdmrl.tasks.medcot import watch

SHORT = SamplerConfig(max_new_tokens=4)
ROWS = [{"prompt": f"Question {i}?", "number": i} for i in range(9)]


def thirds(prompts, completions, number, **columns):
    """Abstains from rows below 4, a batch of them."""
    return [None if n < 4 else n / 3 for n in number]


def halves(prompts, completions, number, **columns):
    """Abstains from rows above 6."""
    return [n / 2 if n <= 6 else None for n in number]


def silent(prompts, completions, **columns):
    return [None] * len(completions)


# -- averages --------------------------------------------------------------------------------------


def test_what_abstains_is_in_no_average(ar):
    """A batch in which nothing counts, one in which some does, and a short last one."""

    def metric(text, row):
        return None if row["number"] < 5 else row["number"] % 2 == 1

    found = evaluate(ar, ROWS, SHORT, [thirds, halves, silent], metric, "eval/", batch_size=4)
    number = np.arange(9)
    assert found["eval/rewards/thirds/mean"] == pytest.approx(number[4:].mean() / 3)
    assert found["eval/rewards/halves/mean"] == pytest.approx(number[:7].mean() / 2)
    assert found["eval/rewards/silent/mean"] is None
    total = np.where(number < 4, 0, number / 3) + np.where(number > 6, 0, number / 2)
    assert found["eval/reward"] == pytest.approx(total.mean())
    assert found["eval/accuracy"] == 0.5  # 5 and 7 of 5 to 8
    assert all(value is None or math.isfinite(value) for value in found.values())


def test_where_nothing_counts_the_average_is_none(ar):
    found = evaluate(ar, ROWS[:3], SHORT, [silent, thirds], lambda text, row: None, batch_size=2)
    assert found["reward"] is found["accuracy"] is found["rewards/thirds/mean"] is None
    assert math.isfinite(found["entropy"])


def test_medcot_without_references_is_no_nan(mdm):
    """The first batch holds no reference at all; of the second all that is judged comes."""
    task = load_task("medcot")
    rows = task.rows("validation", 6)
    rows = [{**row, "Response": "", "Answer": ""} for row in rows[:4]] + rows[4:]
    part = evaluate(mdm, rows[4:], SHORT, task.rewards, task.metric, batch_size=4)
    found = evaluate(mdm, rows, SHORT, task.rewards, task.metric, batch_size=4)
    for name in ("rewards/accuracy/mean", "accuracy"):
        assert found[name] == part[name]
    assert found["rewards/accuracy/mean"] > 0
    assert math.isfinite(found["reward"])


def test_the_averages_of_what_always_counts_keep_their_bits(ar):
    """The mean over batches, each weighed by its rows: as it was computed when all had to count."""

    def length(completions, completion_ids, **columns):
        return [len(ids) / 10 for ids in completion_ids]

    def metric(text, row):
        return row["number"] % 3 == 0

    sampler = SHORT.replace(temperature=1.0)
    found = evaluate(ar, ROWS, sampler, [length], metric, batch_size=4, seed=1)
    reward = accuracy = entropy = 0.0
    for start in (0, 4, 8):
        part = ROWS[start : start + 4]
        generator = generator_for(1, "evaluate", index=start)
        output = generate(ar, [row["prompt"] for row in part], sampler, generator)
        values = torch.tensor([[len(i) / 10] for i in output.token_lists()], dtype=torch.float64)
        reward += values.sum(1).nanmean().item() * len(part) / 9
        accuracy += sum(metric("", row) for row in part) / len(part) * len(part) / 9
        entropy += completion_metrics(ar, output)["entropy"] * len(part) / 9
    assert found["reward"] == found["rewards/length/mean"] == reward
    assert found["accuracy"] == accuracy
    assert found["entropy"] == entropy


def test_weights_and_what_rewards_report(ar):
    def reporting(completions, log_metric, trainer_state, **columns):
        log_metric("share", trainer_state.global_step / trainer_state.max_steps)
        log_metric("reward", 1e6)  # a name that is taken
        return [1.0] * len(completions)

    log = RewardLog(1, 4)
    weights = {"reward_weights": [0.5, 2.0], "log": log}
    found = evaluate(ar, ROWS[5:7], SHORT, [reporting, halves], prefix="eval/", **weights)
    assert found["eval/reward"] == pytest.approx(0.5 + 2 * 5.5 / 2)
    assert found["eval/share"] == 0.25


def test_what_cannot_be_evaluated_is_found_before_the_first_completion(ar):
    def draw(*arguments):
        raise AssertionError("completions were drawn")

    for rewards, rows, message in (
        ([thirds], [{"prompt": "q", "completions": 1}], "column 'completions'"),
        ([thirds], [{"prompt": "q"}], "'thirds': missing .*'number'"),
        (thirds, ROWS, "expected a list of functions"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(ar, rows, SHORT, rewards, draw=draw)


# -- what completions look like --------------------------------------------------------------------


@pytest.fixture
def written(mdm):
    """Four completions: tagged in full; one that repeats itself and never ends; an empty one, with
    a mask behind its end; and one that keeps a mask."""
    end, mask = mdm.tokenizer.eos_token_id, mdm.mask_token_id
    good = mdm.tokenizer("<reasoning>fever</reasoning><answer>gout</answer>").input_ids
    good.append(end)
    rows = [good, [good[0]] * len(good), [end, mask, *good[2:]], [mask, *good[1:]]]
    config = SamplerConfig(max_new_tokens=len(good), steps=1)
    output = generate(mdm, ["x"] * 4, config)
    output.completion_ids = ids = torch.tensor(rows)
    output.completion_mask = mdm.completion_mask(ids)
    output.completions = mdm.decode(ids, output.completion_mask)
    output.logprobs = torch.full(ids.shape, -2.0)
    return output


def test_monitors_by_hand(mdm, written):
    found = completion_metrics(mdm, written, watch)
    rows = written.completion_ids.tolist()
    size = len(rows[0])
    assert found["completions/mean_length"] == pytest.approx((3 * size + 1) / 4)
    assert found["completions/clipped_ratio"] == 0.25
    tagged = [all(tag in text for tag in TAGS) for text in written.completions]
    assert tagged[:3] == [True, False, False]
    assert found["format_rate"] == sum(tagged) / 4
    assert found["leftover_mask_rate"] == 0.25
    assert found["failure_rate"] == 0.75
    repeated = [repetition(rows[0]), 1 - 1 / (size - 3), 0.0, repetition(rows[3])]
    assert found["repetition"] == pytest.approx(sum(repeated) / 4)
    assert found["entropy"] == pytest.approx(2.0)


def test_only_a_policy_that_denoises_can_leave_a_mask(any_policy):
    output = generate(any_policy, ["x"], SamplerConfig(max_new_tokens=4))
    found = completion_metrics(any_policy, output)
    assert ("leftover_mask_rate" in found) == any_policy.denoises == (any_policy.kind != "ar")
    assert not {"format_rate", "failure_rate"} & found.keys()  # those are MedCoT's


def test_a_watch_of_ones_own_sees_texts_and_ids(mdm, written):
    seen = []

    def mine(texts, token_ids):
        seen.extend([texts, token_ids])
        return {"mine": np.float32(0.5)}

    assert completion_metrics(mdm, written, mine)["mine"] == 0.5
    texts, ids = seen
    assert texts == written.completions
    assert [len(row) for row in ids] == written.completion_mask.sum(1).tolist()
    assert [row.count(MASKED) for row in ids] == [0, 0, 0, 1]
    assert all(i == MASKED or i >= 0 for row in ids for i in row)


def test_evaluate_averages_what_the_task_watches(ar):
    def mine(texts, token_ids):
        return {"rows": len(texts), "sometimes": math.nan if len(texts) == 4 else 3}

    found = evaluate(ar, ROWS, SHORT, batch_size=4, watch=mine)
    assert found["rows"] == pytest.approx((4 * 8 + 1) / 9)
    assert found["sometimes"] == 3


def test_what_medcot_watches():
    full = "<reasoning>a</reasoning><answer>b</answer>"
    found = watch([full, full, full, "<answer>"], [[1, 2], [1] * 9, [1, MASKED], [1, 2]])
    assert found == {"format_rate": 0.75, "failure_rate": 0.75}


# -- the table -------------------------------------------------------------------------------------


def counting(text, row):
    return None if row["number"] < 2 else row["number"] % 2 == 0


TOY = Task("toy", {"test": ROWS}, [halves], counting)


def test_a_table_of_objects(mdm, capsys):
    frame = evaluation_table(mdm, TOY, "test", 6, SHORT, [1, 2])
    assert frame.steps.tolist() == [1, 2]
    assert frame.task.tolist() == ["toy"] * 2
    assert frame.prompts.tolist() == [6, 6]
    # Two rows are not judged: the interval is that of the four others.
    assert frame.accuracy.tolist() == [0.5, 0.5]
    interval = wilson_interval(2, 4)
    assert frame.low[0] == interval.low
    assert frame.high[0] == interval.high
    print_table(frame)
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "format_rate" not in shown


def test_a_table_without_a_metric_or_rewards(ar, capsys):
    watched = Task("bare", {"test": lambda: ROWS}, watch=lambda texts, ids: {"spoken": 1})
    frame = evaluation_table(ar, watched, "test", 2, SHORT)
    assert len(frame) == 1
    assert not {"accuracy", "low", "reward"} & {*frame}
    print_table(frame)
    assert "spoken" in capsys.readouterr().out
    nothing = Task("none", {"test": ROWS}, [silent], lambda text, row: None)
    print_table(evaluation_table(ar, nothing, "test", 2, SHORT))
    assert "-" in capsys.readouterr().out


def test_an_autoregressive_policy_has_no_steps(ar):
    frame = evaluation_table(ar, TOY, "test", 2, SHORT)
    assert frame.steps.tolist() == [4]
    with pytest.raises(InputError, match=r"steps=\[2\]: an autoregressive policy has no denoising"):
        evaluation_table(ar, TOY, "test", 2, SHORT, [2])


def test_a_named_policy_is_loaded_and_ones_own_parts_are_used(monkeypatch, mdm):
    seen = []

    def drawn(policy, prompts, config, generator=None, record=False):
        seen.append(len(prompts))
        return generate(policy, prompts, config, generator, record)

    def three(prompts, **columns):
        return [3.0] * len(prompts)

    monkeypatch.setattr("mdmrl.evaluation.tables.load_policy", lambda name: mdm)
    frame = evaluation_table("tiny-mdm", TOY, "test", 2, SHORT, rewards=[three], draw=drawn)
    assert frame.policy.tolist() == ["tiny-mdm"]
    assert frame.reward.tolist() == [3.0] and seen == [2]
