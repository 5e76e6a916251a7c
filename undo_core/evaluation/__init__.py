"""Evaluation of models: exact match, cross-entropy and multiple choice."""
