"""The shipped tiny checkpoints, their recipes, tokenizer and pre-training."""
