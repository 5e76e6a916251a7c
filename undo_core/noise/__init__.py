"""The noise of UNDO and other damage, on models in memory and on checkpoints on disk."""
