"""What a run would take, before it runs: steps, time, disk and memory, and the settings with which it fits."""
