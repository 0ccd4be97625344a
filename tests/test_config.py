"""Settings: what is coerced, what is refused."""

from dataclasses import dataclass, field

import pytest
from conftest import nested

from mdmrl.config import Config, InputError, load_object, unknown
from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.logprobs import ESTIMATORS, estimator
from mdmrl.sampling import SamplerConfig
from mdmrl.training.config import SFTConfig


@dataclass
class Settings(Config):
    learning_rate: float = 1e-4
    steps: int = 8
    bf16: bool = False
    name: str = "x"
    limit: int | None = None
    sizes: list[int] = field(default_factory=list)
    extra: dict = field(default_factory=dict)

    def validate(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}")


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", 3, 3.0),
        ("steps", "16", 16),
        ("steps", 16.0, 16),
        ("steps", "1e3", 1000),
        ("steps", 2**60 + 1, 2**60 + 1),
        ("bf16", "True", True),
        ("bf16", "false", False),
        ("bf16", True, True),
        ("limit", None, None),
        ("limit", "3", 3),
        ("sizes", ("1", 2.0), [1, 2]),
        ("extra", {"a": "1e-5"}, {"a": "1e-5"}),
    ],
)
def test_values_are_coerced_to_the_declared_type(key, given, expected):
    found = getattr(Settings.from_dict({key: given}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("steps", True),
        ("steps", 1.5),
        ("steps", "1.5"),
        ("steps", None),
        ("steps", "many"),
        ("steps", float("nan")),
        ("steps", float("inf")),
        ("learning_rate", False),
        ("learning_rate", "fast"),
        ("learning_rate", [1e-5]),
        ("bf16", 1),
        ("bf16", 0.0),
        ("bf16", "yes"),
        ("bf16", None),
        ("name", 3),
        ("limit", True),
        ("sizes", "12"),
        ("sizes", 12),
        ("sizes", [1.5]),
        ("extra", [1]),
    ],
)
def test_wrong_values_are_refused_by_name(key, given):
    with pytest.raises(ValueError, match=key):
        Settings.from_dict({key: given})


def test_unknown_keys_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"Settings key 'learning_rat'.*'learning_rate'"):
        Settings.from_dict({"learning_rat": 1})
    with pytest.raises(ValueError, match="did you mean 'num_generations'"):
        GRPOConfig.from_dict({"num_generation": 6})
    with pytest.raises(ValueError, match="did you mean 'max_new_tokens'"):
        SamplerConfig().replace(max_new_token=3)
    message = str(unknown("task", "zzz", ["medcot"]))
    assert "did you mean" not in message
    assert "medcot" in message


def test_replace_coerces_validates_and_leaves_the_original():
    original = Settings()
    assert original.replace(steps="3").steps == 3
    with pytest.raises(ValueError, match="steps=0"):
        original.replace(steps=0)
    assert original == Settings()
    assert Settings.from_dict(original.to_dict()) == original


BAD_GRPO = {
    "num_generations": 1,
    "per_device_train_batch_size": 8,  # not a multiple of 6
    "max_steps": 0,
    "num_iterations": 0,
    "ref_model_sync_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "learning_rate": "nan",
    "epsilon": 0,
    "max_grad_norm": "inf",
    "temperature": 0,
    "beta": -0.1,
    "p_mask_prompt": 1,
    "kl_estimator": "k4",
    "remasking": "low_confidance",
    "steps": 0,
    "max_completion_length": 0,
}


@pytest.mark.parametrize("key", BAD_GRPO)
def test_grpo_settings_that_make_no_sense_are_refused_by_name(key):
    with pytest.raises(InputError, match=key):
        GRPOConfig(**nested({key: BAD_GRPO[key]}))


def test_grpo_refuses_a_negative_batch():
    with pytest.raises(InputError, match="per_device_train_batch_size"):
        GRPOConfig(per_device_train_batch_size=-6, gradient_accumulation_steps=-1)


def test_the_sampler_is_checked_with_the_number_of_tokens(mdm, ar):
    with pytest.raises(InputError, match=r"steps=64.*32"):
        GRPOConfig(sampler={"steps": 64}, max_completion_length=32)
    assert GRPOConfig(max_completion_length=33).sampler_for(mdm).denoising_steps == 17
    found = GRPOConfig(sampler={"block_length": "32", "top_p": 0.9}, temperature=0.7)
    assert found.sampler == {"block_length": 32, "top_p": 0.9}
    assert found.sampler_for(mdm) == SamplerConfig(
        block_length=32, top_p=0.9, temperature=0.7, remasking="state_confidence"
    )
    greedy = found.sampler_for(mdm, greedy=True)
    assert (greedy.temperature, greedy.block_length, greedy.top_p) == (0, 32, 1)
    assert GRPOConfig().sampler_for(ar) == SamplerConfig(temperature=1.0)
    with pytest.raises(InputError, match="block_length=33: expected a divisor"):
        GRPOConfig(sampler={"block_length": 33})
    with pytest.raises(InputError, match=r"did you mean 'steps'"):
        GRPOConfig(sampler={"step": 3})
    with pytest.raises(InputError, match="max_completion_length, which stands beside it"):
        GRPOConfig(sampler={"max_new_tokens": 3})
    assert GRPOConfig(sampler=SamplerConfig(steps=4)).sampler == {"steps": 4}


@pytest.mark.parametrize("made", [GRPOConfig, PPOConfig, SFTConfig])
@pytest.mark.parametrize("name", ["steps", "block_length", "remasking", "end_last"])
def test_a_setting_that_has_moved_says_where_to(made, name):
    for make in (made, lambda **values: made.from_dict(values)):
        with pytest.raises(InputError, match=rf"{name}=4: .*sampler={{'{name}': ...}}"):
            make(**{name: 4})


def test_defaults_are_the_recommended_and_the_thesis_is_a_preset(ar, mdm, bd):
    ours, thesis = GRPOConfig(), GRPOConfig.thesis()
    assert (ours.kl_estimator, ours.beta) == ("k2", 0.05)
    assert (thesis.kl_estimator, thesis.beta, thesis.epsilon) == ("k3", 1, 0.1)
    for policy in (mdm, bd):
        assert ours.settings_for(policy)["logp_estimator"] == "trajectory"
        assert ours.sampler_for(policy).remasking == "state_confidence"
        assert thesis.sampler_for(policy).remasking == "low_confidence"
        assert estimator(thesis.logp_estimator, policy) is ESTIMATORS["ar_style"]
        assert estimator(ours.logp_estimator, policy) is ESTIMATORS["trajectory"]
    for config in (ours, thesis):
        assert estimator(config.logp_estimator, ar) is ESTIMATORS["exact"]
    assert GRPOConfig.thesis(beta=0, sampler={"steps": 8}).sampler["steps"] == 8
    assert GRPOConfig.thesis(learning_rate=5e-6).learning_rate == 5e-6


IGNORED = {
    "p_mask_prompt": {"p_mask_prompt": 0.3},
    "p_mask_prompt of another": {"p_mask_prompt": 0.3, "logp_estimator": "elbo"},
    "kl_estimator": {"kl_estimator": "k1", "beta": 0},
    "kl_in_reward": {"kl_in_reward": True, "beta": 0},
    "log_kl": {"log_kl": True},
    "target_kl": {"target_kl": 0.1, "beta": 0},
    "psi": {"psi": 2.0},
    "epsilon_high": {"epsilon_high": 0.3, "loss_type": "wd1", "beta": 0},
}


@pytest.mark.parametrize("name", IGNORED)
def test_an_option_that_would_be_ignored_is_refused(name):
    with pytest.raises(InputError, match=rf"{name.split()[0]}=.*would be ignored"):
        GRPOConfig(**IGNORED[name])


@pytest.mark.parametrize(
    "beside", [{"loss_type": "wd1"}, {"loss_type": "spg"}, {"kl_in_reward": True}]
)
def test_the_ratio_of_k3_ratio_must_exist(beside):
    with pytest.raises(InputError, match=rf"k3_ratio' with {next(iter(beside))}=.*ratio"):
        GRPOConfig(kl_estimator="k3_ratio", **beside)


def test_the_thesis_takes_a_sampler_as_any_config_does():
    for given in ({"steps": 4}, SamplerConfig(steps=4)):
        made = GRPOConfig.thesis(sampler=given)
        assert made.sampler == {"remasking": "low_confidence", "steps": 4}
    for given in (3, None, [1]):
        with pytest.raises(InputError, match="sampler="):
            GRPOConfig.thesis(sampler=given)


def test_scale_rewards_takes_what_trl_takes():
    found = [GRPOConfig(scale_rewards=value).scale_rewards for value in (True, False, "batch")]
    assert found == ["group", "none", "batch"]
    with pytest.raises(InputError, match="scale_rewards"):
        GRPOConfig(scale_rewards="groups")


def test_a_function_may_be_given_or_named_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def half(d):\n    return d / 2\n")
    assert GRPOConfig(kl_estimator=f"{path}:half").kl_estimator(3) == 1.5
    assert GRPOConfig(kl_estimator=len).kl_estimator is len
    with pytest.raises(InputError, match=r"object in .*mine.py 'hal': did you mean 'half'"):
        load_object(f"{path}:hal")
    with pytest.raises(InputError, match="there is no file"):
        load_object("nowhere.py:half")
    with pytest.raises(InputError, match=r"expected FILE.py:NAME"):
        load_object("mine")


def test_a_users_file_may_define_data_classes(tmp_path):
    """Under postponed annotations they ask for the module that they are in."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from typing import ClassVar\n\n@dataclass\nclass Short:\n    kind: ClassVar[str] = 'x'\n"
        "    scale: float = 2.0\n"
    )
    assert load_object(f"{path}:Short")(scale=3.0).scale == 3.0


def test_changed_is_what_makes_the_same_settings():
    assert Settings().changed() == {}
    settings = Settings(steps=2, sizes=[1], limit=None, name="x")
    assert settings.changed() == {"steps": 2, "sizes": [1]}
    assert Settings.from_dict(settings.changed()) == settings

    @dataclass
    class Needy(Config):
        name: str

    assert Needy(name="").changed() == {"name": ""}
