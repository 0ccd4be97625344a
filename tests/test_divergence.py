"""The KL of paths, against the oracle."""

import copy

import pytest
import torch

from mdmrl.rl.divergence import path_kl
from mdmrl.rl.oracle import Oracle, all_texts, denoiser_of, tabulate
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig
from mdmrl.zoo.toy import toy_policy

PROMPT, LENGTH, BLOCK, STATES, MASK = "aba", 4, 2, 4, 3


def sampler(**changes):
    settings = {
        "max_new_tokens": LENGTH,
        "steps": LENGTH,
        "remasking": "state_confidence",
        "temperature": 1.0,
        "end_last": False,
        "stop_at_end": False,
    }
    return SamplerConfig(**settings | changes)


def pair(family):
    """A toy, and one whose weights have moved a little."""
    start = toy_policy("ab", family, 1, BLOCK)
    policy = type(start)(copy.deepcopy(start.model), start.tokenizer)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator_for(0, "move")))
    return policy, start


def paths(policy, denoiser, texts, a_step):
    """The step at which `policy` reveals each position of each text, (N, L): per block, `a_step`
    positions at a time, those of the largest probability first."""
    size, order = policy.block_length or LENGTH, torch.full_like(texts, -1)
    step = 0
    for first in range(0, LENGTH, size):
        for _ in range(size // a_step):
            canvas = texts.masked_fill(order < 0, MASK)
            best = denoiser(canvas).amax(-1).masked_fill(order >= 0, -torch.inf)
            chosen = best[:, first : first + size].topk(a_step, 1).indices + first
            order.scatter_(1, chosen, step)
            step += 1
    return order


@pytest.mark.parametrize("family", ["mdm", "bd"])
@pytest.mark.parametrize("a_step", [1, 2])
def test_it_is_the_expected_log_ratio_of_paths(family, a_step):
    policy, start = pair(family)
    with torch.no_grad():
        texts = all_texts(policy, LENGTH)
        mine, theirs = (
            tabulate(denoiser_of(p, PROMPT, LENGTH), STATES, LENGTH) for p in (policy, start)
        )
        order = paths(policy, mine, texts, a_step)
        logp, before = (
            Oracle(denoiser, texts, MASK, policy.block_length).trajectory(order)
            for denoiser in (mine, theirs)
        )
    assert logp.exp().sum().item() == pytest.approx(1)
    exact = (logp.exp() * (logp - before)).sum().item()
    config = sampler(steps=LENGTH // a_step)
    found = path_kl(policy, start, [PROMPT] * 1000, config, generator_for(2, "paths"))
    error = found.std().item() / len(found) ** 0.5
    assert exact > 20 * error
    assert abs(found.mean().item() - exact) < 3 * error + 1e-5
    assert path_kl(policy, policy, [PROMPT], config, generator_for(0, "x")).tolist() == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"remasking": "low_confidence"},
        {"stop_at_end": True},
        {"order_temperature": 1.0},
        {"steps": None, "threshold": 0.9},
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"suppress_mask": False},
        {"top_p": 0.9},
    ],
    ids=str,
)
def test_other_samplers_are_refused(changes):
    policy, start = pair("mdm")
    with pytest.raises(ValueError, match="expected"):
        path_kl(policy, start, [PROMPT], sampler(**changes), generator_for(0, "x"))
