"""Reinforcement learning of masked diffusion language models, and its autoregressive twin.

Names are imported when first used, so that `import mdmrl` costs next to nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "load_policy": "mdmrl.policies",
    "add_lora": "mdmrl.policies",
    "generate": "mdmrl.sampling",
    "infill": "mdmrl.sampling",
    "SamplerConfig": "mdmrl.sampling",
    "Task": "mdmrl.tasks",
    "load_task": "mdmrl.tasks",
    "load_rows": "mdmrl.tasks",
    "SFTConfig": "mdmrl.training.config",
    "train_sft": "mdmrl.training.sft",
    "GRPOConfig": "mdmrl.rl.config",
    "train_grpo": "mdmrl.rl.grpo",
    "PPOConfig": "mdmrl.rl.config",
    "train_ppo": "mdmrl.rl.ppo",
    "DPOConfig": "mdmrl.rl.preference",
    "train_dpo": "mdmrl.rl.preference",
    "RFTConfig": "mdmrl.rl.rejection",
    "train_rft": "mdmrl.rl.rejection",
    "evaluate": "mdmrl.evaluation.accuracy",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mdmrl' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
