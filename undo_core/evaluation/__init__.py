"""What a model can do: likelihood, accuracy, multiple choice."""
