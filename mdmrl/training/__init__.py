"""One training loop, what it keeps, and supervised learning."""
