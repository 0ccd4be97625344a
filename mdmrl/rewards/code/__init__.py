"""Rewards of code: a judge that runs programs against tests they never see, and what it pays."""

from mdmrl.rewards.code.boxes import Ended, Limits, monty
from mdmrl.rewards.code.extract import extract_code, programs_of
from mdmrl.rewards.code.judge import GRADES, Verdict, check_tests, judge
from mdmrl.rewards.code.reward import ast_reward, code_reward, correctness_reward
from mdmrl.rewards.code.sandbox import bubblewrap, process_session
