"""Predicts the peak memory of a stage by running its code on the meta device, where tensors have shapes but no contents."""
