"""Files, progress bars and the memory of the process; nothing here depends on a model."""
