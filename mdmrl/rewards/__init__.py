"""Reward functions of TRL's signature: `f(prompts, completions, completion_ids, **columns)`."""

from mdmrl.rewards.answers import (
    choice_reward,
    choice_right,
    extract_choice,
    extract_number,
    marked_answer,
    number_reward,
    number_right,
)
from mdmrl.rewards.countdown import countdown_reward, countdown_right
from mdmrl.rewards.maths import maths_reward, maths_right
from mdmrl.rewards.medical import medical_rewards
from mdmrl.rewards.protocol import (
    RewardLog,
    check_rewards,
    complete_rows,
    reward_name,
    reward_values,
    total_reward,
)
from mdmrl.rewards.sudoku import sudoku_reward, sudoku_right
from mdmrl.rewards.text import completion_text, exact_answer
