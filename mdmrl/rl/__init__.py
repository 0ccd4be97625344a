"""Learning: pre-training losses, log-probability and KL estimators, advantages, GRPO."""
