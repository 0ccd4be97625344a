"""Reward functions of TRL's signature: `f(prompts, completions, completion_ids, **columns)`."""

from mdmrl.rewards.medical import Accuracy, capped_depth, depth, format_tags, medical_rewards
from mdmrl.rewards.protocol import (
    RewardLog,
    check_rewards,
    complete_rows,
    reward_name,
    reward_values,
    total_reward,
)
from mdmrl.rewards.text import completion_text, exact_answer, extract_answer, strip_tags

__all__ = [
    "Accuracy",
    "RewardLog",
    "capped_depth",
    "check_rewards",
    "complete_rows",
    "completion_text",
    "depth",
    "exact_answer",
    "extract_answer",
    "format_tags",
    "medical_rewards",
    "reward_name",
    "reward_values",
    "strip_tags",
    "total_reward",
]
