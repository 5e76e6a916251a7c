"""Distillation: training of a student, and the teachers that it can learn from."""
