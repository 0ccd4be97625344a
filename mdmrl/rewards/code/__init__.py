"""Rewards for Python code."""
