"""Reward functions of TRL's signature: `f(prompts, completions, completion_ids, **columns)`."""

from mdmrl.rewards.medical import medical_rewards
from mdmrl.rewards.protocol import (
    RewardLog,
    check_rewards,
    complete_rows,
    reward_name,
    reward_values,
    total_reward,
)
from mdmrl.rewards.text import completion_text, exact_answer
