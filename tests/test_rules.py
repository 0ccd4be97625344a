"""Commit rules: ours by name, and one's own."""

import copy

import pytest
import torch
from test_sampling import PROMPTS, ender
from torch.utils._python_dispatch import TorchDispatchMode

from mdmrl.config import InputError
from mdmrl.rl.divergence import path_kl
from mdmrl.rl.episodes import score_episodes
from mdmrl.rl.logprobs import draw_noise, estimator
from mdmrl.rl.rollout import Rollout
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, choose, generate
from mdmrl.sampling.output import SamplerOutput
from mdmrl.sampling.rules import RULES, Rule
from mdmrl.zoo.toy import toy_policy


def second_best(logits, tokens, logprobs, positions, generator):
    """`margin`, by another way."""
    p = logits.softmax(-1).sort(-1, descending=True).values
    return p[:, 0] - p[:, 1]


def as_sure(logits, tokens, logprobs, positions, generator):
    """`low_confidence`, by another way."""
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


def likely(logits, tokens, logprobs, positions, generator):
    """`state_confidence`, by another way."""
    return logits.log_softmax(-1).amax(-1)


def leftmost(logits, tokens, logprobs, positions, generator):
    return -positions


def throw(logits, tokens, logprobs, positions, generator):
    return torch.rand(len(tokens), generator=generator)


OWN = {"margin": second_best, "low_confidence": as_sure, "sequential": leftmost, "random": throw}
OWN["state_confidence"] = likely


def settings(**changes):
    return SamplerConfig(**{"max_new_tokens": 12, "steps": 6} | changes)


def run(policy, seed=0, **changes):
    return generate(policy, PROMPTS, settings(**changes), generator_for(seed, "x"), record=True)


def test_the_table_has_every_rule_under_its_name():
    assert [*RULES] == [
        "low_confidence",
        "state_confidence",
        "margin",
        "entropy",
        "sequential",
        "random",
    ]
    assert SamplerConfig().rule is RULES["low_confidence"]


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize("family", ["mdm", "bd"])
@pytest.mark.parametrize("name", OWN)
def test_a_users_rule_that_equals_ours_gives_the_same_tokens(name, family, changes, request):
    policy = ender(request.getfixturevalue(family), 4)
    ours, own = (run(policy, remasking=rule, **changes) for rule in (name, OWN[name]))
    assert torch.equal(own.sequences, ours.sequences)
    for one, two in zip(own.trajectory, ours.trajectory, strict=True):
        assert torch.equal(one.positions, two.positions)


def test_a_rule_sees_what_it_is_promised(mdm):
    seen = []

    def spy(logits, tokens, logprobs, positions, generator):
        seen.append(positions)
        assert (logits.amax(-1) == 0).all()
        assert (logits[:, mdm.mask_token_id] == -torch.inf).all()
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
        return logprobs

    for changes in ({}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 3}):
        found = run(mdm, remasking=spy, **changes)
    width = found.prompt_mask.shape[1]
    assert seen[0].tolist() == [*range(width, width + 12)] * 4


def test_a_rule_of_a_file_is_named_by_it(mdm, tmp_path):
    file = tmp_path / "my_rules.py"
    file.write_text(
        "def rightmost(logits, tokens, logprobs, positions, generator):\n    return positions\n"
    )
    config = settings(remasking=f"{file}:rightmost", steps=12)
    assert config.described() == "max_new_tokens=12 steps=12 remasking=rightmost"
    assert config.to_dict()["remasking"] == "rightmost"
    assert config.replace(temperature=1.0).remasking is config.remasking
    found = generate(
        mdm, PROMPTS[:1], config.replace(stop_at_end=False, end_last=False), None, True
    )
    assert [step.positions.item() for step in found.trajectory] == [*range(11, -1, -1)]
    with pytest.raises(InputError, match="unknown remasking 'rightmost'"):
        settings(remasking="rightmost")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logits, tokens, logprobs, positions, generator: logits,
        lambda logits, tokens, logprobs, positions, generator: logprobs * torch.nan,
        lambda logits, tokens, logprobs, positions, generator: None,
    ],
)
def test_a_rule_that_gives_no_scores_is_refused(mdm, wrong):
    with pytest.raises(
        InputError, match=r"(?s)remasking=<lambda> returned .*: expected 48 numbers"
    ):
        run(mdm, remasking=wrong)


# -- what must be known of a rule ------------------------------------------------------------------


def test_a_threshold_needs_a_probability(mdm):
    changes = {"threshold": 0.3, "steps": None}
    with pytest.raises(InputError, match="remasking=as_sure: a threshold is a probability"):
        settings(remasking=as_sure, **changes)
    own = run(mdm, remasking=Rule(as_sure, log_probability=True), **changes)
    assert torch.equal(own.sequences, run(mdm, **changes).sequences)


def test_an_order_can_be_drawn_where_the_state_alone_decides(mdm):
    changes = {"order_temperature": 0.5, "end_last": False, "temperature": 1.0}
    for rule in (likely, Rule(likely, log_probability=True), "margin", "low_confidence"):
        with pytest.raises(InputError, match=r"order_temperature=0\.5 with remasking="):
            settings(remasking=rule, **changes)
    known = Rule(likely, before_drawing=True, log_probability=True)
    own, ours = (run(mdm, remasking=rule, **changes) for rule in (known, "state_confidence"))
    assert torch.equal(own.sequences, ours.sequences)


def rollout_of(policy, **changes):
    config = settings(
        **{"max_new_tokens": 4, "steps": 2, "temperature": 1.0, "stop_at_end": False} | changes
    )
    output = generate(policy, ["aba"] * 8, config, generator_for(0, "x"), record=True)
    return Rollout.of(output, torch.zeros(8), torch.ones(8, dtype=torch.bool), config)


def trajectory_positions(policy, rollout):
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"))
    return estimator("trajectory-positions", policy)(policy, rollout, noise)


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_the_probability_of_a_choice_is_known_or_refused(name):
    policy = toy_policy("ab", "mdm", 1, 2)
    rollout = rollout_of(policy, remasking=OWN[name])
    message = f"remasking={OWN[name].__name__}: nothing says with which probability"
    with pytest.raises(InputError, match=message):
        trajectory_positions(policy, rollout)
    known = Rule(OWN[name], log_choice=RULES[name].log_choice)
    found = trajectory_positions(policy, rollout_of(policy, remasking=known))
    expected = trajectory_positions(policy, rollout_of(policy, remasking=name))
    torch.testing.assert_close(found, expected)


def test_the_kl_of_paths_needs_the_state_alone():
    start = toy_policy("ab", "mdm", 1, 2)
    policy = type(start)(copy.deepcopy(start.model), start.tokenizer)
    path = {"max_new_tokens": 4, "steps": 4, "temperature": 1.0, "stop_at_end": False}

    def kl(rule):
        return path_kl(policy, start, ["aba"], settings(remasking=rule, **path), torch.Generator())

    with pytest.raises(InputError, match=r"remasking=likely.*expected a remasking that looks at"):
        kl(likely)
    assert kl(Rule(likely, before_drawing=True)).tolist() == kl("margin").tolist() == [0]


@torch.no_grad()
def test_episodes_need_the_state_alone():
    policy = toy_policy("ab", "mdm", 1, 2)
    with pytest.raises(InputError, match="remasking=likely: expected a rule that looks at the st"):
        score_episodes(policy, rollout_of(policy, remasking=likely), 4, reference=False)
    known = Rule(likely, before_drawing=True)
    own, ours = (
        score_episodes(policy, rollout_of(policy, remasking=rule), 4, reference=False)
        for rule in (known, "state_confidence")
    )
    assert torch.equal(own.features, ours.features)


# -- devices without float64 -----------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """As Apple's device, where such a tensor cannot be made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for made in found if isinstance(found, tuple | list) else [found]:
            if isinstance(made, torch.Tensor):
                assert made.dtype != torch.double, f"{function} makes float64"
        return found


@torch.no_grad()
@pytest.mark.parametrize("family", ["ar", "mdm", "bd"])
def test_no_float64_is_made_where_there_is_none(family, request, monkeypatch):
    """But for the drawing of tokens, which looks at the device."""
    monkeypatch.setattr(choose, "draw_in_proportion", choose.by_race)
    policy = request.getfixturevalue(family)
    variants = [{"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9}, {}]
    if policy.denoises:
        variants = [{"steps": 6, "remasking": name, "temperature": 1.0} for name in RULES]
        variants += [
            {"entropy_bound": 1.0},
            {"threshold": 0.3},
            {"revise": 1},
            {"cfg_scale": 1.0},
            {"order_temperature": 1.0, "remasking": "state_confidence", "end_last": False},
        ]
    with NoFloat64():
        for changes in variants:
            found = generate(policy, PROMPTS, SamplerConfig(max_new_tokens=12, **changes))
    assert found.completions


@torch.no_grad()
@pytest.mark.parametrize("name", RULES)
def test_scoring_a_choice_makes_no_float64(name):
    policy = toy_policy("ab", "mdm", 1, 2)
    rollout = rollout_of(policy, remasking=name)
    with NoFloat64():
        trajectory_positions(policy, rollout)


# -- families --------------------------------------------------------------------------------------


def shout(policy, prompts, config, generator, record):
    """A sampler of one's own: the prompt again."""
    given = policy.encode(prompts)
    twice = torch.cat([given.input_ids, given.input_ids], 1)
    logprobs = torch.zeros(given.input_ids.shape)
    return SamplerOutput.of(policy, twice, given.attention_mask, logprobs, nfe=0, token_forwards=0)


def test_generate_calls_the_familys_own_sampler(ar):
    class Loud(type(ar)):
        sampler = shout

    assert generate(Loud(ar.model, ar.tokenizer), ["why"]).completions[0] == "why"
