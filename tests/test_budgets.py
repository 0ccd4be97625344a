"""Tiny models pre-trained on other budgets than those that ship, for rows 9 and 11."""

import itertools
import math

import pandas as pd
import pytest
import torch

from mdmrl.config import InputError
from mdmrl.evaluation.stats import paired_interval
from mdmrl.policies import load_policy
from mdmrl.policies.load import ZOO
from mdmrl.study import benchmark, pieces
from mdmrl.tasks import countdown, load_task
from mdmrl.zoo import budgets
from mdmrl.zoo.recipes import COUNTDOWN, RECIPES


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    recipe = COUNTDOWN.replace(
        **small, num_attention_heads=2, batch_size=8, tokens=300, logging_steps=1
    )
    monkeypatch.setitem(RECIPES, "tiny-toy", recipe)


def test_a_model_that_does_not_ship_is_trained_once_by_its_recipe(monkeypatch):
    task = load_task("countdown")
    rows = task.rows("test", 6)
    found = budgets.scores("tiny-toy", task, rows, "quick", 600.0)
    assert found["index"].tolist() == list(range(6)) and set(found.score) <= {0, 1}
    assert load_policy(pieces.runs_folder("quick") / "pretrain/tiny-toy-600/model").denoises
    assert pieces.facts("quick", found.run[0])["identity"]["recipe"]["tokens"] == 600

    monkeypatch.setattr(budgets, "pretrain_by_name", lambda *_: pytest.fail("again"))
    again = budgets.scores("tiny-toy", task, rows, "quick", 600.0)
    pd.testing.assert_frame_equal(again, found)
    with pytest.raises(pytest.fail.Exception):  # its own budget is another model
        budgets.scores("tiny-toy", task, rows, "quick")
    with pytest.raises(InputError, match="tiny-tou"):
        budgets.scores("tiny-tou", task, rows, "quick", 600.0)


def test_a_model_that_ships_is_not_trained(monkeypatch):
    seen = []
    monkeypatch.setattr(budgets, "load_policy", lambda name: name)
    monkeypatch.setattr(benchmark, "scores", lambda *given: seen.append(given))
    monkeypatch.setattr(budgets, "pretrain_by_name", lambda *_: pytest.fail("trained"))
    for name in ("tiny-ar-countdown", "smollm2-135m"):
        budgets.scores(name, "task", "rows", "quick")
        assert seen.pop() == (name, "task", "rows", "quick", budgets.BATCH)


def test_bounds_are_of_the_whole_canvas_and_a_token(monkeypatch):
    rows = [{"prompt": "1,2,3:6", "completion": text} for text in ("1+2+3", "1*2*3*1")]
    (exact, other) = budgets.bounds(["tiny-ar-countdown"], rows, "quick", canvas=12).nats
    policy = load_policy("tiny-ar-countdown")
    prompt, text = policy.token_lists(["1,2,3:6"])[0], policy.tokenizer("1+2+3").input_ids
    ids = torch.tensor([[*prompt, *text, policy.tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    with torch.no_grad():
        assert exact == pytest.approx(policy.model(input_ids=ids, labels=labels).loss.item(), 1e-4)
    assert exact != other

    asked = []
    monkeypatch.setattr(
        budgets,
        "log_likelihoods",
        lambda _, pairs, *__, **___: asked.extend(pairs) or [(-12.0, 1)] * 2,
    )
    found = budgets.bounds(["tiny-toy"], rows, "quick", canvas=12)
    end = load_policy("tiny-mdm-countdown").tokenizer.eos_token_id
    assert [(len(text), text.count(end)) for _, text in asked] == [(12, 7), (12, 5)]
    assert found.nats.tolist() == [2.0, 1.5]  # of 6 and 8 tokens, with the end


@pytest.mark.parametrize("gained, there", [(99, True), (100, False)])
def test_a_plateau_is_a_gain_of_under_two_points(monkeypatch, gained, there):
    asked = []

    def scores(name, task, rows, profile, tokens=None):
        asked.append(tokens)
        assert len(rows) == 5000
        right = [1] * (2000 + gained * (tokens is not None)) + [0] * 5000
        return pd.DataFrame({"index": range(5000), "score": right[:5000]})

    monkeypatch.setattr(budgets, "scores", scores)
    (line,) = budgets.longer(["tiny-mdm-countdown"], 5000, "q").itertuples()
    assert asked == [None, 21333333.0]  # 4/3 of 16 million
    assert (line.right, line.right_longer) == pytest.approx((40, (2000 + gained) / 50))
    ends = [100 * end for end in paired_interval(gained, 0, 5000)]
    assert [line.change, line.low, line.high] == pytest.approx(ends)
    assert bool(line.at_plateau) is there


def test_a_model_named_again_goes_on_from_where_it_was(monkeypatch):
    right = {None: 10, 21333333.0: 16, 28444444.0: 19}  # of 20 items; 16 million, and 4/3 of it

    def scores(name, task, rows, profile, tokens=None):
        return pd.DataFrame({"index": range(20), "score": [i < right[tokens] for i in range(20)]})

    monkeypatch.setattr(budgets, "scores", scores)
    found = budgets.longer(["tiny-mdm-countdown"] * 2, 20, "q")
    assert found.tokens.tolist() == [16e6, 21333333.0]
    assert found.change.tolist() == pytest.approx([30, 15])


def test_unseen_items_are_distinct_and_none_of_pre_training():
    items = countdown.generator().unseen(5000)
    assert len({(*row["nums"], row["target"]) for row in items}) == 5000
    trained = itertools.islice(load_task("countdown").stream(0), 5000)
    keys = {(*row["nums"], row["target"]) for row in trained}
    assert not keys & {(*row["nums"], row["target"]) for row in items}
    assert items[:10] == countdown.generator().unseen(10)


def test_tokens_are_those_of_the_recipes():
    found = budgets.tokens(["tiny-ar", "tiny-mdm-countdown-equal", "mine"])["million tokens"]
    assert found.tolist()[:2] == [4, 8] and math.isnan(found[2])


@pytest.mark.parametrize("task", ["", "-countdown"])
def test_an_equal_pair_has_equal_tokens(task):
    ar, mdm = f"tiny-ar{task}", f"tiny-mdm{task}-equal"
    assert ar in ZOO and mdm not in ZOO
    assert RECIPES[ar].replace(family="mdm") == RECIPES[mdm]
