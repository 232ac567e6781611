"""The objectives: pure functions of per-sequence log-probabilities."""
