"""Many training runs: what to run, what to decide, where to record it."""
