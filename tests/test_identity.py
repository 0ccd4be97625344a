"""What makes two runs one: what a reader would call the same reward, and nothing else."""

import copy
import linecache
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from mdmrl.config import load_object
from mdmrl.identity import described, fingerprint
from mdmrl.rewards.medical import Accuracy, depth


def weighted(weight):
    def reward(prompts, completions, **columns):
        return [weight * len(text) for text in completions]

    return reward


def counting():
    calls, log = 0, []

    def reward(prompts, completions, **columns):
        nonlocal calls
        calls += 1
        log.append(calls)
        return [1.0] * len(prompts)

    return reward


@dataclass
class Wanted:
    letter: str


class Scaled:
    def __init__(self, scale):
        self.scale, self.calls = scale, 0

    def __call__(self, prompts, **columns):
        self.calls += 1
        return [self.scale] * len(prompts)


def plain(prompts, **columns):
    return [0.0] * len(prompts)


def table(value):
    """A frame whose repr shows its first and last rows alone."""
    return pd.DataFrame({"answer": [value if row == 500 else 0 for row in range(1000)]})


def network(seed):
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(seed)
        layer.bias.fill_(0)
    return layer


OTHERS = {
    "closures": (weighted(1), weighted(2)),
    "closures over lists": (weighted(["a"]), weighted(["b"])),
    "closures over tensors": (weighted(torch.zeros(2)), weighted(torch.ones(2))),
    "closures over arrays": (weighted(np.zeros(2)), weighted(np.zeros(3))),
    "closures over text arrays": (weighted(np.array(["a"])), weighted(np.array(["b"]))),
    "closures over long tables": (weighted(table(1)), weighted(table(2))),
    "closures over networks": (weighted(network(0)), weighted(network(1))),
    "closures over functions": (weighted(weighted(1)), weighted(weighted(2))),
    "partials": (partial(plain, weight=1), partial(plain, weight=2)),
    "data classes": (Wanted("a"), Wanted("z")),
    "attributes": (Scaled(1), Scaled(2)),
    "bound methods": (Scaled(1).__call__, Scaled(2).__call__),
    "lambdas on one line": (lambda prompts, **columns: [1.0], lambda prompts, **columns: [2.0]),
    "ours": (Accuracy(), Accuracy(answer_only=True)),
    "ours by name": (depth, plain),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_in_what_it_captures_is_another(name):
    one, other = OTHERS[name]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)
    assert "0x" not in fingerprint(one)


@pytest.mark.parametrize("make", [counting, lambda: Scaled(1), lambda: weighted(3)])
def test_what_a_reward_counts_when_it_is_called_is_no_part_of_it(make):
    reward = make()
    before = fingerprint(reward)
    reward(prompts=["q"], completions=["a"])
    assert fingerprint(reward) == before == fingerprint(make())


def test_defaults_count():
    def one(prompts, weight=1, **columns):
        return [weight]

    first = fingerprint(one)
    one.__defaults__ = (2,)
    assert fingerprint(one) != first


def reader(text):
    """A function that a module of that text defines, as `exec` leaves it."""
    module = {}
    exec(text, module)
    return module["reward"]


def test_globals_that_are_read_count_and_those_that_are_written_do_not():
    reads = "def reward(prompts, **columns):\n    return [SCALE] * len(prompts)\n"
    one, two = (reader(f"SCALE = {value}\n{reads}") for value in (1, 2))
    assert fingerprint(one) != fingerprint(two)
    helper = "def helper():\n    return {}\n"
    calls = "def reward(prompts, **columns):\n    return [helper()] * len(prompts)\n"
    one, two = (reader(helper.format(value) + calls) for value in (1, 2))
    assert fingerprint(one) != fingerprint(two)
    writes = "def reward(prompts, **columns):\n    global N\n    N += 1\n    return [1.0]\n"
    one, two = (reader(f"N = {value}\n{writes}") for value in (1, 2))
    assert fingerprint(one) == fingerprint(two)


def test_a_function_that_holds_itself_is_described():
    def reward(prompts, **columns):
        return reward and [0.0]

    assert fingerprint(reward) == fingerprint(reward)


def test_data_is_known_by_value():
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]
    assert described(rows) == described(copy.deepcopy(rows))
    assert described(rows) == described([dict(reversed(row.items())) for row in rows])
    for changed in (rows[:1], rows[::-1], [rows[0], {"prompt": "b", "n": 0}], [*rows, rows[0]]):
        assert described(rows) != described(changed)


def test_another_process_finds_the_same(tmp_path):
    """Hashes of text are seeded anew in every process, and addresses move."""
    text = """
import torch
from mdmrl.identity import fingerprint

def make(words):
    def reward(prompts, **columns):
        return [len(words)] * len(prompts)
    return reward

print(fingerprint(make({"b", "a", "c"})), fingerprint(make({"k": torch.ones(3)})))
"""
    (tmp_path / "mine.py").write_text(text)
    found = {
        subprocess.run(
            [sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(found) == 1


def test_a_users_file_is_the_users_whatever_it_is_called(tmp_path):
    """One that has the name of an installed module too."""
    path, found = tmp_path / "statistics.py", []
    for value in (1.0, 2.0):
        path.write_text(f"def mine(prompts, **columns):\n    return [{value}] * len(prompts)\n")
        linecache.clearcache()
        found.append(fingerprint(load_object(f"{path}:mine")))
    assert found[0] != found[1]
    assert statistics.mean([1, 3]) == 2
