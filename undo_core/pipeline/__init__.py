"""The whole method as stages: what they are, in which order, where their results are kept, and how they run side by side."""
