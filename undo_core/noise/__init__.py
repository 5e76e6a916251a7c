"""UNDO's noise and other kinds of damage, for models in memory and checkpoints on disk."""
