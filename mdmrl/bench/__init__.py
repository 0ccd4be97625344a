"""Timings, on the machine at hand and with its name; never asserted in tests."""
