"""Language models behind one interface: `load_policy` gives one by name."""

from mdmrl.policies.base import (
    AutoregressivePolicy,
    BlockDiffusionPolicy,
    MaskedDiffusionPolicy,
    Policy,
    Prompts,
)
from mdmrl.policies.load import load_policy
from mdmrl.policies.lora import add_lora

__all__ = [
    "AutoregressivePolicy",
    "BlockDiffusionPolicy",
    "MaskedDiffusionPolicy",
    "Policy",
    "Prompts",
    "add_lora",
    "load_policy",
]
