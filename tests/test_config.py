"""Settings: what is coerced, what is refused."""

from dataclasses import dataclass, field

import pytest

from mdmrl.config import Config, unknown
from mdmrl.rl.config import GRPOConfig
from mdmrl.sampling import SamplerConfig


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
    name = "max_new_tokens" if key == "max_completion_length" else key
    with pytest.raises(ValueError, match=name):
        GRPOConfig.from_dict({key: BAD_GRPO[key]})


def test_grpo_refuses_a_negative_batch():
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        GRPOConfig(per_device_train_batch_size=-6, gradient_accumulation_steps=-1)


def test_grpo_refuses_more_steps_than_tokens_as_the_sampler_does():
    with pytest.raises(ValueError, match=r"steps=64.*32"):
        GRPOConfig(steps=64, max_completion_length=32)
    assert GRPOConfig(max_completion_length=33).sampler().denoising_steps == 17
    assert GRPOConfig(block_length=32).sampler() == SamplerConfig(block_length=32, temperature=1.0)
    with pytest.raises(ValueError, match="block_length=33: expected a divisor"):
        GRPOConfig(block_length=33)


def test_changed_is_what_makes_the_same_settings():
    assert Settings().changed() == {}
    settings = Settings(steps=2, sizes=[1], limit=None, name="x")
    assert settings.changed() == {"steps": 2, "sizes": [1]}
    assert Settings.from_dict(settings.changed()) == settings

    @dataclass
    class Needy(Config):
        name: str

    assert Needy(name="").changed() == {"name": ""}
