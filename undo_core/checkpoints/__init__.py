"""Checkpoint folders: which files hold which parameters, as transformers resolves them."""
