"""The method as a pipeline of stages: their definitions, their order, the folders of their results, and parallel execution."""
