"""Reward functions of TRL's signature: `f(prompts, completions, completion_ids, **columns)`."""

from mdmrl.rewards.medical import Accuracy, capped_depth, depth, format_tags, medical_rewards
from mdmrl.rewards.text import completion_text, exact_answer, extract_answer, strip_tags

__all__ = [
    "Accuracy",
    "capped_depth",
    "completion_text",
    "depth",
    "exact_answer",
    "extract_answer",
    "format_tags",
    "medical_rewards",
    "strip_tags",
]
