"""Tiny random policies that every test of the core shares."""

import copy
import os
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import mdmrl.zoo
from mdmrl.config import resolve
from mdmrl.training.config import NESTED
from mdmrl.zoo.pretrain import PretrainConfig, make_policy

# Workers share the cores, and the kernels of notebooks inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
# What is asserted to the bit is so on the processor; test_devices.py has a card of its own.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that ships with the package."""
    folder = mdmrl.zoo.__path__[0] + "/tokenizer"
    return AutoTokenizer.from_pretrained(folder)


def nested(changes):
    """Settings of a training run, those of its sampler moved to where a config has them."""
    own = {name: value for name, value in changes.items() if name not in NESTED}
    return own | {"sampler": {name: changes[name] for name in changes if name in NESTED}}


def parity(prompts, completions, completion_ids, **columns):
    """A reward: the share of odd token ids, which varies within a group."""
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


class Interrupted(Exception):
    pass


class Cut:
    """`parity` that breaks the run off at its n-th call, and is the same reward whatever n is."""

    __name__ = "parity"
    fingerprint = staticmethod(lambda: "parity")

    def __init__(self, call=None, by=Interrupted):
        self.calls, self.call, self.by = 0, call, by

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.calls += 1
        if self.calls == self.call:
            raise self.by
        return parity(prompts, completions, completion_ids)


def random_policy(family, tokenizer, seed=0, **shapes):
    """A tiny policy whose weights are large enough that logits are spread and attention matters."""
    shapes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "canvas": 12,
        "block_length": 4,
    } | shapes
    policy = make_policy(PretrainConfig(family=family, seed=seed, **shapes), tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.4 * noise)
    return policy


@pytest.fixture(scope="session")
def shared_policies(tokenizer):
    """One of each family; copy before changing weights."""
    return {family: random_policy(family, tokenizer) for family in ("ar", "mdm", "bd")}


def _fresh(policy):
    return type(policy)(copy.deepcopy(policy.model), copy.deepcopy(policy.tokenizer))


@pytest.fixture
def ar(shared_policies):
    """A fresh random autoregressive policy."""
    return _fresh(shared_policies["ar"])


@pytest.fixture
def mdm(shared_policies):
    """A fresh random masked diffusion policy."""
    return _fresh(shared_policies["mdm"])


@pytest.fixture
def bd(shared_policies):
    """A fresh random block diffusion policy, blocks of 4."""
    return _fresh(shared_policies["bd"])


@pytest.fixture(params=["ar", "mdm", "bd"])
def any_policy(request, shared_policies):
    """Each family in turn."""
    return _fresh(shared_policies[request.param])


@pytest.fixture(params=["ar", "mdm"])
def policy(request, shared_policies):
    """The two families that need no blocks, in turn."""
    return _fresh(shared_policies[request.param])


def loss_of(policy, batch, learn_prompt, generator):
    """The loss of the policy's family, in nats per position learnt."""
    total, count = resolve(policy.loss)(policy, batch, learn_prompt, generator)
    return total / count


@pytest.fixture
def rng_untouched():
    """Fails the test if it moves a global random state."""

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    yield
    assert state() == before, "the global random state was touched"
