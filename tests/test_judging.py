"""The pieces of notebooks 08 and 09 on a toy task, and how pieces are kept."""

from functools import partial

import pandas as pd
import pytest
import torch
from test_sampling import double

from mdmrl.provenance import machine, revision
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import score_episodes
from mdmrl.rl.rollout import Rollout
from mdmrl.rl.values import explained_variance, fit_to_base
from mdmrl.runs import generator_for
from mdmrl.sampling import generate
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.sampling.guided import calibrate, generate_guided
from mdmrl.sampling.selection import PromptOnly, mean_logprob
from mdmrl.study import judging, pieces
from mdmrl.tasks.base import Task

FINDINGS = {
    "rl": ("fever", "a rash", "pain", "nothing"),
    "validation": ("chills", "itching", "an ache", "less"),
    "test": ("sweat", "spots", "cramps", "more"),
}
SPLITS = {
    split: [{"prompt": f"A patient has {x}. Why?"} for x in found]
    for split, found in FINDINGS.items()
}
CONFIG = PPOConfig(
    max_completion_length=8,
    sampler={"steps": 8, "block_length": 4},
    value_batches=4,
    per_device_train_batch_size=4,
    num_generations=1,
)


def drawn(purpose):
    return generator_for(0, purpose)


def odd(ids):
    return sum(i % 2 for i in ids)


@pytest.fixture
def reward():
    """The number of odd token ids; a test may put another function into the list."""
    return [odd]


@pytest.fixture
def policy(mdm, reward, tmp_path, monkeypatch):
    """A toy and a task of the reward, instead of those that have names."""

    def judge(prompts, completions, completion_ids, **columns):
        return [float(reward[0](ids)) for ids in completion_ids]

    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    policy = double(mdm)
    splits = {split: partial(list, rows) for split, rows in SPLITS.items()}
    task = Task("toy", splits, [judge], lambda text, row: "e" in text)
    monkeypatch.setattr(judging, "load_policy", lambda name: policy)
    monkeypatch.setattr(judging, "load_task", lambda name: task)
    return policy


def test_a_piece_is_computed_once_for_all_that_decides_it(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    computed = []

    def compute(name):
        computed.append(name)
        return pd.DataFrame({"x": [1 / 3], "said": ["n/a"]}), {"why": "a test"}

    first = pieces.cached_table("quick", "slug", {"a": 1}, compute)
    pd.testing.assert_frame_equal(pieces.cached_table("quick", "slug", {"a": 1}, compute), first)
    assert first.x.tolist() == [0.333333] and first.said.tolist() == ["n/a"]
    assert first.run.tolist() == computed
    facts = pieces.facts("quick", computed[0])
    assert facts["why"] == "a test" and facts["identity"] == {"a": 1}
    assert facts["machine"] == machine("cpu") and facts["revision"] == revision()
    pieces.cached_table("quick", "slug", {"a": 2}, compute)
    pieces.cached_table("other", "slug", {"a": 1}, compute)
    assert len(computed) == 3 and computed[0] == computed[2] != computed[1]
    with pytest.raises(ZeroDivisionError):
        pieces.cached_table("quick", "slug", {"a": 3}, lambda name: 1 / 0)
    assert len(list(pieces.pieces_folder("quick").iterdir())) == 4  # nothing half done


@pytest.mark.parametrize(
    ("of", "low", "high"),
    [
        (lambda ids: odd(ids[:4]), 1, 1),
        (lambda ids: odd(ids[4:]), -0.8, 0.8),
        (odd, 0.2, 0.95),
    ],
    ids=["first half", "second half", "both"],
)
def test_how_much_the_first_half_decides(policy, reward, of, low, high):
    seen = []

    def noted(ids):
        seen.append(of(ids))
        return seen[-1]

    reward[0] = noted
    found = judging.what_is_decided("toy", CONFIG, 4, 12, "quick")
    assert found.endings.tolist() == list(range(1, 13))
    assert (found.seed == 0).all() and (found.decided == found.decided[0]).all()
    assert low <= found.decided[0] <= high
    endings, outcome = torch.tensor(seen, dtype=torch.double).view(13, 4).split([12, 1])
    for n, explained in zip(found.endings, found.explained, strict=True):
        left = outcome[0] - endings[:n].mean(0)  # the text as it was, scored last
        expected = 1 - left.var() / outcome.var()
        assert explained == pytest.approx(expected.item(), abs=1e-5)


def test_half_of_a_text_is_a_state_only_between_blocks(policy):
    for settings in ({"sampler": {"block_length": 8}}, {"max_completion_length": 12}):
        odd_number = CONFIG.replace(**settings)
        with pytest.raises(ValueError, match="an even number of blocks"):
            judging.what_is_decided("toy", odd_number, 4, 2, "quick")
    with pytest.raises(ValueError, match="an even number of blocks"):
        judging.guided_completions("toy", odd_number, 2, 2, 2, 3, "quick")


def test_v_explains_what_it_said_it_explains(policy):
    """What V says of the held-out completions, from the states of a run of its own."""
    found = judging.what_v_explains("toy", CONFIG, [2, 4], 4, "quick")
    sampler = CONFIG.sampler_for(policy)
    prompts = [row["prompt"] for row in SPLITS["validation"]]
    output = generate(policy, prompts, sampler, generator_for(0, "held-out"), record=True)
    outcome = torch.tensor([float(odd(ids)) for ids in output.token_lists()])
    rollout = Rollout.of(output, outcome, outcome.isfinite(), sampler)
    features = score_episodes(policy, rollout, 8, reference=False).features
    for batches in (2, 4):
        config = CONFIG.replace(value_batches=batches)
        V, _ = fit_to_base(policy, judging.load_task("toy").rewards, SPLITS["rl"], config)
        expected = [explained_variance(column, outcome) for column in V(features).T]
        of_them = found[found.completions == 4 * batches]
        assert of_them.step.tolist() == list(range(8))
        assert of_them.explained.tolist() == pytest.approx(expected, abs=1e-3)


def test_guided_completions_are_those_of_the_guided_sampler(policy):
    found = judging.guided_completions("toy", CONFIG, 2, 2, 2, 3, "quick")
    arms = ["plain", "two gates", "permuted", "the thesis's bands"]
    arms += ["mean log-probability", "prompt alone"]
    counts = found.groupby(["arm", "prompt"], sort=False).size()
    each = {arm: 6 if arm == "plain" else 2 for arm in arms}
    assert counts.to_dict() == {(arm, i): each[arm] for arm in arms for i in (0, 1)}
    V, _ = fit_to_base(policy, judging.load_task("toy").rewards, SPLITS["rl"], CONFIG)

    def value(states):
        return V(states.features).detach()

    sampler = CONFIG.sampler_for(policy)
    asked = [row["prompt"] for row in SPLITS["test"][:2]]
    others = [row["prompt"] for row in SPLITS["validation"][:2]]
    plain = found[found.arm == "plain"]
    texts = [prompt for prompt in asked for _ in range(6)]
    output = generate(policy, texts, sampler, generator_for(0, "base"))
    assert plain.reward.tolist() == [odd(ids) for ids in output.token_lists()]
    assert plain.accuracy.tolist() == ["e" in text for text in output.completions]
    assert (plain["logp/00"] == 0).all()
    written = output.logprobs[:, :4].mean(1).tolist()  # before the second block
    assert plain["logp/04"].tolist() == pytest.approx(written, rel=1e-4)
    assert (plain["V/07"] == plain.V).all()
    gates = calibrate(policy, others, sampler, GuideConfig(), value, drawn("calibrate"))
    assert (plain.stopped == (plain["V/05"] < gates.high[1, 1].item())).all()

    start = plain["V/00"].values[[0, 0, 6, 6]]
    alone = generate_guided(policy, others, sampler, GuideConfig(), value, None, drawn("calibrate"))
    judges = {
        "two gates": (value, value, "two_gates"),
        "the thesis's bands": (value, value, "faithful"),
        "mean log-probability": (mean_logprob, mean_logprob, "two_gates"),
        "prompt alone": (
            PromptOnly(torch.tensor(start)),
            PromptOnly(alone.values[:, 0, 0]),
            "two_gates",
        ),
    }
    texts = [prompt for prompt in asked for _ in range(2)]
    for arm, (judge, on_others, form) in judges.items():
        guide = GuideConfig(budget=3, form=form)
        gates = calibrate(policy, others, sampler, guide, on_others, drawn("calibrate"))
        output = generate_guided(policy, texts, sampler, guide, judge, gates, drawn("guided"))
        guided = found[found.arm == arm]
        assert guided.reward.tolist() == [odd(ids) for ids in output.token_lists()]
        assert guided.spent.tolist() == output.spent.tolist()
    spent = found[found.arm == "two gates"].spent.values.reshape(2, 2)
    permuted = found[found.arm == "permuted"].spent.values.reshape(2, 2)
    assert (spent == permuted[:, ::-1]).all()  # the other completion's schedule
