"""Files, progress and memory of the process: what knows no model."""
