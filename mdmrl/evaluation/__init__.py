"""How what was measured is judged: statistics."""
