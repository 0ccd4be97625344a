"""Learning: pre-training, fine-tuning, log-probability and KL estimators, advantages, GRPO."""
