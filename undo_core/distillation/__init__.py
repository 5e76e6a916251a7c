"""Distillation: the student's training and the teachers that it can learn from."""
