"""Reward heads: their losses against enumeration, and what they recover."""

import math
from itertools import permutations

import pytest
import torch
from conftest import random_policy

from mdmrl.identity import fingerprint
from mdmrl.rewards import check_rewards
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import train_grpo
from mdmrl.rl.reward_models import (
    RewardHead,
    RewardModel,
    bradley_terry_loss,
    plackett_luce_loss,
)
from mdmrl.runs import generator_for, read_rows


def scores(*shape, seed=0):
    return 2 * torch.randn(shape, generator=generator_for(seed, "scores"), dtype=torch.double)


def drawn_orders(utilities, count, generator):
    """Rankings of Plackett and Luce: one after the other is taken from what is left."""
    orders = []
    for _ in range(count):
        weights, order = utilities.exp(), []
        for _ in utilities:
            order.append(torch.multinomial(weights, 1, generator=generator).item())
            weights = weights.index_fill(0, torch.tensor(order), 0.0)
        orders.append(order)
    return orders


def test_plackett_luce_is_a_law_over_permutations():
    """Every ranking has the probability of drawing it one by one; together they are certain."""
    s, total = scores(4), 0.0
    for order in permutations(range(4)):
        left, p = list(order), 1.0
        for k in order:
            p *= math.exp(s[k]) / sum(math.exp(s[j]) for j in left)
            left.remove(k)
        (loss,) = plackett_luce_loss(s[list(order)][None])
        assert loss.item() == pytest.approx(-math.log(p), rel=1e-12)
        total += math.exp(-loss)
    assert total == pytest.approx(1, rel=1e-12)


def test_of_two_it_is_bradley_and_terrys_which_is_a_logistic_function():
    s = scores(5, 2)
    expected = [math.log1p(math.exp(b - a)) for a, b in s.tolist()]
    assert bradley_terry_loss(*s.T).tolist() == pytest.approx(expected, rel=1e-12)
    assert plackett_luce_loss(s).tolist() == pytest.approx(expected, rel=1e-12)
    same_for_all = scores(5, 1, seed=1)
    assert plackett_luce_loss(s + same_for_all).tolist() == pytest.approx(expected)


def test_what_stands_behind_a_shorter_ranking_does_not_count():
    s = scores(2, 4).requires_grad_()
    ranked = torch.tensor([[True] * 4, [True, True, False, False]])
    loss = plackett_luce_loss(s, ranked)
    alone = torch.cat([plackett_luce_loss(s[:1]), plackett_luce_loss(s[1:, :2])])
    torch.testing.assert_close(loss, alone)
    (slope,) = torch.autograd.grad(loss.sum(), s)
    (expected,) = torch.autograd.grad(alone.sum(), s)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("length", [2, 4])
def test_a_head_recovers_the_utilities_of_its_rankings(length):
    """Up to a constant: from many rankings of items with linear utilities."""
    generator = generator_for(0, "items")
    features = torch.randn(40, 3, generator=generator)
    utilities = features @ torch.tensor([1.0, -0.5, 0.2]) + 3
    rankings = []
    for _ in range(3000 // length):
        items = torch.randperm(40, generator=generator)[:length]
        (order,) = drawn_orders(utilities[items], 1, generator)
        rankings.append(items[order].tolist())
    head = RewardHead(3)
    right = head.fit(features, rankings, penalty=0.0)
    found = head(features)
    assert found.mean().item() == pytest.approx(0, abs=1e-5)
    assert (found - (utilities - utilities.mean())).abs().max() < 0.35
    pairs = [(r[i], r[j]) for r in rankings for i in range(length) for j in range(i + 1, length)]
    assert right == pytest.approx(sum(bool(found[a] > found[b]) for a, b in pairs) / len(pairs))


def test_the_fit_is_where_the_gradient_vanishes():
    features = torch.randn(12, 3, generator=generator_for(0, "x"))
    rankings = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [11, 9, 10]]
    head = RewardHead(3)
    head.fit(features, rankings, penalty=0.1)
    found = head(features)
    loss = sum(plackett_luce_loss(found[r][None]).sum() for r in rankings) / 4
    loss = loss + 0.05 * head.weight.square().sum()
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert slope.abs().max() < 1e-5


ROWS = [
    {"prompt": "Name a fruit.", "ranking": ["an apple", "apple", "car"]},
    {"prompt": "And a tall tree?", "chosen": "oak", "rejected": "a"},
    {"prompt": "Stone?", "chosen": "flint", "rejected": "the sea and more"},
]
TEXTS = [("Name a fruit.", "car"), ("Stone?", "flint"), ("And a tall tree?", "")]


def test_a_model_ranks_as_it_was_told_whatever_shares_its_batch(any_policy, tmp_path):
    model = RewardModel(any_policy)
    assert model.fit(ROWS) == 1.0
    one, two, three = model([row["prompt"] for row in ROWS[:1]] * 3, ROWS[0]["ranking"])
    assert one > two > three
    prompts, texts = zip(*TEXTS, strict=True)
    together = model(list(prompts), list(texts))
    alone = [model([prompt], [text])[0] for prompt, text in TEXTS]
    assert together == pytest.approx(alone, abs=1e-3)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert model(list(prompts), messages, target=[1, 2, 3]) == together
    model.save_pretrained(tmp_path / "judge")
    again = RewardModel.from_pretrained(tmp_path / "judge")
    assert again(list(prompts), list(texts)) == pytest.approx(together, abs=1e-6)
    assert fingerprint(again) == fingerprint(model)
    again.fit(ROWS[:1])
    assert fingerprint(again) != fingerprint(model)


def test_a_model_is_the_reward_of_a_run(mdm, tokenizer, tmp_path):
    judge = RewardModel(random_policy("ar", tokenizer), name="proxy")
    judge.fit(ROWS)
    assert check_rewards([judge], rows=ROWS[1:]) == ["proxy"]
    config = GRPOConfig(
        output_dir=tmp_path / "run",
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=8,
        sampler={"steps": 2},
    )
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    (row, _) = read_rows(train_grpo(mdm, [judge], rows, config) / "metrics.jsonl")
    assert row["rewards/proxy/mean"] == row["reward"] != 0
    judge.fit(ROWS[:1])
    with pytest.raises(ValueError, match="holds another run"):
        train_grpo(mdm, [judge], rows, config)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rankings given"),
        ([{"prompt": "x", "chosen": "y"}], "row 1 has the fields prompt, chosen: expected prompt"),
        ([{"prompt": "x", "ranking": ["y"]}], "row 1 .*two completions or more"),
    ],
)
def test_rows_without_a_ranking_are_refused(ar, rows, message):
    with pytest.raises(ValueError, match=message):
        RewardModel(ar).fit(rows)
