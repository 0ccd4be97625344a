"""Evaluation: what counts is averaged, what completions look like, the table of both, and the
examples that they are of."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Interrupted

from mdmrl.config import InputError
from mdmrl.evaluation.accuracy import completion_metrics, evaluate
from mdmrl.evaluation.examples import (
    evaluate_examples,
    evaluation_identity,
    prompt_hash,
    summary,
)
from mdmrl.evaluation.stats import clustered_interval, wilson_interval
from mdmrl.evaluation.tables import print_table, samplers_of, table_row
from mdmrl.rewards import RewardLog
from mdmrl.rewards.text import TAGS, repetition
from mdmrl.runs import RunFolderError, as_json, generator_for
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


def table_of(policy, task, limit, steps=()):
    rows = task.rows("test", limit)
    samplers = samplers_of(policy, SHORT, steps)
    found = [evaluate_examples(policy, task, rows, s, rewards=task.rewards) for s in samplers]
    pairs = zip(samplers, found, strict=True)
    return pd.DataFrame([table_row("name", policy, task, "test", *pair) for pair in pairs])


def test_a_table_of_objects(mdm, capsys):
    frame = table_of(mdm, TOY, 6, [1, 2])
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
    frame = table_of(ar, watched, 2)
    assert len(frame) == 1
    assert not {"accuracy", "low", "reward"} & {*frame}
    print_table(frame)
    assert "spoken" in capsys.readouterr().out
    nothing = Task("none", {"test": ROWS}, [silent], lambda text, row: None)
    print_table(table_of(ar, nothing, 2))
    assert "-" in capsys.readouterr().out


def test_an_autoregressive_policy_has_no_steps(ar):
    frame = table_of(ar, TOY, 2)
    assert frame.steps.tolist() == [4]
    with pytest.raises(InputError, match=r"steps=\[2\]: an autoregressive policy has no denoising"):
        table_of(ar, TOY, 2, [2])


# -- example by example ----------------------------------------------------------------------------


WARM = SHORT.replace(temperature=1.0)


def first_letter(text):
    return text[:1] or None


def vowel(text, row):
    """Abstains from rows below 2; what else is judged is drawn at random."""
    return None if row["number"] < 2 else len(text) % 2 == 0


LETTERS = Task("letters", {"test": ROWS}, metric=vowel, extract=first_letter)


def without_seconds(found):
    return found.examples.drop(columns="seconds")


def test_examples_are_what_evaluate_averages(any_policy):
    task = replace(LETTERS, rewards=[halves], watch=lambda texts, ids: {"rows": len(texts)})
    how = {"rewards": task.rewards, "batch_size": 4}
    found = evaluate_examples(any_policy, task, ROWS, WARM, seeds=[3], **how)
    judging = {"watch": task.watch, "seed": 3, "batch_size": 4}
    expected = evaluate(any_policy, ROWS, WARM, [halves], vowel, **judging)
    assert found.averages.keys() == expected.keys()
    assert found.averages == pytest.approx(expected)
    assert np.nanmean(found.examples["rewards/halves"]) == pytest.approx(expected["reward"])
    assert found.examples.score.isna().tolist() == [True] * 2 + [False] * 7
    assert found.examples.extracted.tolist() == [t[:1] or None for t in found.examples.completion]


def test_costs_are_shares_of_the_batch(mdm):
    outputs = []

    def drawn(*arguments):
        outputs.append(generate(*arguments))
        return outputs[-1]

    found = evaluate_examples(mdm, LETTERS, ROWS, SHORT, draw=drawn, batch_size=5).examples
    assert found.batch.tolist() == [0] * 5 + [1] * 4
    for output, (_, batch) in zip(outputs, found.groupby("batch"), strict=True):
        assert batch.completion.tolist() == output.completions
        assert set(batch.nfe) == {output.nfe}
        assert batch.positions.sum() == pytest.approx(output.token_forwards)
    assert (found.seconds > 0).all()


def test_prompts_are_known_by_all_but_the_solution():
    row = {"prompt": "1,2:3", "nums": [1, 2], "target": 3}
    known = prompt_hash(row)
    assert re.fullmatch("[0-9a-f]{16}", known)
    assert (
        prompt_hash({"target": 3, "completion": "1+2", "nums": [1, 2], "prompt": "1,2:3"}) == known
    )
    for other in ({"target": 4}, {"prompt": "2,1:3"}, {"nums": [1, 3]}, {"prompt": [{"a": "b"}]}):
        assert prompt_hash(row | other) != known
    assert prompt_hash(row | {"seconds": 3}) == known  # which it is not scored by
    assert prompt_hash(ROWS[0]) != prompt_hash(ROWS[0] | {"number": 9})


def test_seeds_and_samples_are_completions_of_their_own(ar):
    how = {"seeds": [0, 5], "samples": 3, "batch_size": 4}
    found = evaluate_examples(ar, LETTERS, ROWS, WARM, **how).examples
    assert len(found) == 2 * 9 * 3
    places = set(zip(found["index"], found.seed, found["sample"], strict=True))
    assert places == set(itertools.product(range(9), (0, 5), range(3)))
    assert found.groupby("index").prompt_hash.nunique().eq(1).all()
    assert found.groupby("index").completion.nunique().gt(3).all()
    alone = evaluate_examples(ar, LETTERS, ROWS, WARM, seeds=[5], samples=3, batch_size=4).examples
    assert found[found.seed == 5].completion.tolist() == alone.completion.tolist()


@pytest.mark.parametrize(
    "cut", ["between batches", "within a batch", "within a line", "at the end"]
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_examples(mdm, tmp_path, cut):
    calls = []

    def drawn(policy, prompts, config, generator):
        calls.append(len(prompts))
        if len(calls) == 3 and cut != "at the end":
            raise Interrupted
        return generate(policy, prompts, config, generator)

    how = {"seeds": [0, 1], "batch_size": 4, "rewards": [halves]}
    how["draw"] = Drawn(drawn)
    whole = evaluate_examples(mdm, LETTERS, ROWS, WARM, **how | {"draw": Drawn(generate)})
    folder = tmp_path / "run"
    if cut == "at the end":
        evaluate_examples(mdm, LETTERS, ROWS, WARM, output_dir=folder, **how)
        calls.clear()
    else:
        with pytest.raises(Interrupted):
            evaluate_examples(mdm, LETTERS, ROWS, WARM, output_dir=folder, **how)
    file = folder / "examples.jsonl"
    if cut == "within a batch":
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*lines, lines[-1].replace('"batch": 1', '"batch": 2')]))
    elif cut == "within a line":
        file.write_text(file.read_text() + '{"batch": 2, "index": 8, "comp')
    calls[:] = [None] * 3  # past the interruption
    found = evaluate_examples(mdm, LETTERS, ROWS, WARM, output_dir=folder, **how)
    assert calls[3:] == ([] if cut == "at the end" else [1, 4, 4, 1])
    pd.testing.assert_frame_equal(without_seconds(found), without_seconds(whole))
    assert found.averages == pytest.approx(whole.averages, rel=1e-12)
    assert len(file.read_text().splitlines()) == 18
    with pytest.raises(RunFolderError, match=r"holds another run .*samples 1 -> 2"):
        evaluate_examples(mdm, LETTERS, ROWS, WARM, output_dir=folder, samples=2, **how)


@pytest.mark.parametrize("file", ["metrics", "examples"])
@pytest.mark.parametrize("line", range(3))
def test_a_batch_of_which_a_line_was_taken_out_is_drawn_again(mdm, tmp_path, file, line):
    how = {"batch_size": 4, "output_dir": tmp_path / "run"}
    whole = evaluate_examples(mdm, LETTERS, ROWS, WARM, **how)
    path = tmp_path / "run" / f"{file}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    del lines[line]
    path.write_text("".join(lines))
    found = evaluate_examples(mdm, LETTERS, ROWS, WARM, **how)
    pd.testing.assert_frame_equal(without_seconds(found), without_seconds(whole))
    assert len(path.read_text().splitlines()) == len(lines) + 1


class Drawn:
    """A sampler that is the same whatever it calls."""

    fingerprint = staticmethod(lambda: "drawn")

    def __init__(self, call):
        self.call = call

    def __call__(self, *arguments):
        return self.call(*arguments)


def test_the_identity_holds_all_that_decides(mdm, ar):
    def known(policy=mdm, task=LETTERS, rows=ROWS, sampler=SHORT, **how):
        return as_json(evaluation_identity(policy, task, rows, sampler, **how))

    others = [
        known(policy=ar),
        known(task=replace(LETTERS, metric=counting)),
        known(task=replace(LETTERS, extract=None)),
        known(rows=ROWS[:8]),
        known(rows=[{**row, "number": row["number"] + 1} for row in ROWS]),
        known(sampler=WARM),
        known(sampler=SHORT.replace(steps=1)),
        known(seeds=[1]),
        known(samples=2),
        known(rewards=[halves]),
        known(draw=lambda *arguments: generate(*arguments)),
        known(batch_size=8),
    ]
    assert known() == known() and len({known(), *others}) == 13


def test_completions_that_would_all_be_the_same_are_refused(mdm):
    def examples(sampler, **how):
        return evaluate_examples(mdm, LETTERS, ROWS[:2], sampler, **how).examples

    with pytest.raises(InputError, match=r"samples=2: at temperature=0 .* set a temperature"):
        examples(SHORT, samples=2)
    with pytest.raises(InputError, match=r"seeds=\[0, 1\]: at temperature=0 .* or give one seed"):
        examples(SHORT, seeds=[0, 1])
    for how, message in (({"samples": 0}, "samples=0"), ({"seeds": []}, "no seeds")):
        with pytest.raises(InputError, match=message):
            examples(WARM, **how)
    with pytest.raises(InputError, match=r"seeds=\[1, 1\]: expected each once"):
        examples(WARM, seeds=[1, 1])
    with pytest.raises(InputError, match="batch_size=0: expected 1 or more"):
        examples(WARM, batch_size=0)
    assert len(examples(SHORT.replace(remasking="random"), seeds=[0, 1])) == 4


def test_the_task_sets_length_and_steps_where_nothing_is_said(mdm, ar):
    task = replace(LETTERS, sampler={"max_new_tokens": 6, "steps": 3})
    for policy, nfe in ((mdm, 3), (ar, 6)):
        found = evaluate_examples(policy, task, ROWS[:2]).examples
        assert set(found.nfe) == {nfe}


# -- what examples come to -------------------------------------------------------------------------


def scored(*scores, seeds=1):
    """Examples with these scores: a list an item, its completions in turn of each seed."""
    rows = [
        {"index": i, "seed": j % seeds, "sample": j // seeds, "score": score}
        for i, item in enumerate(scores)
        for j, score in enumerate(item)
    ]
    return pd.DataFrame(rows).astype({"score": float})


def test_one_completion_an_item_has_wilsons_interval():
    found = summary(scored([1], [0], [None], [1], [1]))
    assert found["n"] == found["completions"] == 4
    assert found["left_out"] == 1
    assert found["seeds"] == [0]
    interval = wilson_interval(3, 4)
    assert [found["accuracy"], *found["interval"]] == pytest.approx(list(interval))
    nothing = summary(scored([None], [None]))
    assert nothing["accuracy"] is nothing["interval"] is None
    assert (nothing["n"], nothing["left_out"]) == (0, 2)


def test_items_count_alike_whatever_was_judged_of_them():
    found = summary(scored([1, 0], [1, None], [0, 0], seeds=2))
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert (found["n"], found["completions"], found["left_out"]) == (3, 5, 1)
    assert found["by_seed"] == {"0": pytest.approx(2 / 3), "1": 0}
    interval = clustered_interval([0.5, 1, 0], 2)
    assert found["interval"] == pytest.approx(interval[1:])


def test_pass_at_k_is_over_prompts():
    found = summary(scored([1, 0, 0, 0], [0] * 4, [1, 1, 0, 1]), ks=[1, 2, 4])
    chances = {k: estimate["estimate"] for k, estimate in found["pass@k"].items()}
    assert chances == pytest.approx({"1": (1 / 4 + 3 / 4) / 3, "2": (1 / 2 + 1) / 3, "4": 2 / 3})
    assert found["pass@k"]["1"]["estimate"] == pytest.approx(found["accuracy"])
    for k, estimate in found["pass@k"].items():
        low, high = estimate["interval"]
        assert 0 <= low < chances[k] < high <= 1
    assert found["pass@k"]["4"]["interval"] == pytest.approx(wilson_interval(2, 3)[1:])
    with pytest.raises(InputError, match="k=5: expected 1 to 4"):
        summary(scored([1, 0, 0, 0]), ks=[5])
