"""Predicts what a run needs before it starts: steps, time, disk and memory, and settings with which it fits."""
