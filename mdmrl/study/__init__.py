"""Headless reproduction, outputs of the notebooks, the claims ledger, plots and widgets."""
