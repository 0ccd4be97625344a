"""A folder is resumed only by the run that made it, known by all that decides its results."""

import copy
import json

import pytest
import torch
from conftest import nested

from mdmrl.policies import MaskedDiffusionPolicy
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import train_grpo
from mdmrl.runs import RunFolderError
from mdmrl.sampling import generate
from mdmrl.sampling.denoise import sample

ROWS = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(6)]


def weighted(weight):
    def reward(prompts, completions, **columns):
        return [weight * len(text) for text in completions]

    return reward


def holds(text):
    def metric(completion, row):
        return text in completion

    return metric


def shifted(policy, rollout, noise):
    return torch.zeros_like(rollout.completion_mask, dtype=torch.float32)


def leftmost(logits, tokens, logprobs, positions, generator):
    return -positions.float()


def rightmost(logits, tokens, logprobs, positions, generator):
    return positions.float()


def drawn(policy, prompts, config, generator=None, record=False):
    return generate(policy, prompts, config, generator, record)


def family(shift):
    """A family of one's own, that draws in a way of its own."""

    class Mine(MaskedDiffusionPolicy):
        @staticmethod
        def sampler(policy, prompts, config, generator, record):
            return sample(policy, prompts, config.replace(steps=1 + shift), generator, record)

    return Mine


GIVEN = {
    "rows": ROWS[:4],
    "eval_rows": ROWS[4:],
    "rewards": [weighted(1)],
    "metric": holds("a"),
    "probe": None,
    "draw": generate,
    "watch": None,
    "remasking": "state_confidence",
    "logp_estimator": "one_step",
    "kl_estimator": "k2",
}
CHANGES = {
    "another cut between training and held-out rows": {"rows": ROWS[:3], "eval_rows": ROWS[3:]},
    "rows in another order": {"rows": ROWS[3::-1]},
    "a column of a row": {"rows": [{**ROWS[0], "answer": "9"}, *ROWS[1:4]]},
    "what the reward captures": {"rewards": [weighted(2)]},
    "what the metric captures": {"metric": holds("b")},
    "a probe": {"probe": lambda policy: {"one": 1.0}},
    "what is watched": {"watch": lambda texts, ids: {"one": 1.0}},
    "what draws": {"draw": drawn},
    "a commit rule of one's own": {"remasking": leftmost},
    "another commit rule of one's own": {"remasking": rightmost},
    "an estimator of one's own": {"logp_estimator": shifted},
    "a KL form of one's own": {"kl_estimator": lambda d: d.abs()},
    "a setting": {"learning_rate": 2e-4},
    "the seed": {"seed": 1},
}


def train(policy, folder, **changes):
    given = GIVEN | changes
    parts = {n: given.pop(n) for n in ("rewards", "rows", "eval_rows", "metric", "probe", "draw")}
    watch = given.pop("watch")
    small = {"max_steps": 1, "max_completion_length": 6, "steps": 2, "output_dir": str(folder)}
    config = GRPOConfig(**nested(small | {"num_generations": 2} | given))
    return train_grpo(policy, config=config, **parts, watch=watch)


@pytest.fixture(scope="module")
def finished(shared_policies, tmp_path_factory):
    """A folder with a run in it, and a way to get the policy that it began with."""
    base = shared_policies["mdm"]

    def fresh(family=MaskedDiffusionPolicy):
        return family(copy.deepcopy(base.model), copy.deepcopy(base.tokenizer))

    return train(fresh(), tmp_path_factory.mktemp("run") / "run"), fresh


def test_the_same_run_is_found_again(finished):
    folder, fresh = finished
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(fresh(), folder, rewards=[weighted(1)], metric=holds("a")) == folder
    assert (folder / "metrics.jsonl").read_bytes() == before
    held = json.loads((folder / "config.json").read_text())
    assert held["sampler"]["remasking"] == "state_confidence"  # resolved, not as it was asked for
    assert held["sampler"]["max_new_tokens"] == 6


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_results_makes_another_run(finished, name):
    folder, fresh = finished
    with pytest.raises(RunFolderError, match="holds another run"):
        train(fresh(), folder, **CHANGES[name])


def chat_template(policy):
    policy.tokenizer.chat_template = " " + policy.tokenizer.chat_template


def end_token(policy):
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, 7]


def logit_shift(policy):
    policy.logit_shift = True


def frozen(policy):
    next(policy.model.parameters()).requires_grad_(False)


@pytest.mark.parametrize("change", [chat_template, end_token, logit_shift, frozen])
def test_what_the_policy_is_makes_another_run(finished, change):
    folder, fresh = finished
    change(policy := fresh())
    with pytest.raises(RunFolderError, match="policy"):
        train(policy, folder)


def test_a_family_of_ones_own_is_known_by_what_it_captures(finished, tmp_path):
    folder, fresh = finished
    with pytest.raises(RunFolderError, match="family"):
        train(fresh(family(0)), folder)
    train(fresh(family(0)), tmp_path / "run")
    train(fresh(family(0)), tmp_path / "run")
    with pytest.raises(RunFolderError, match="family"):
        train(fresh(family(1)), tmp_path / "run")
