"""The truth about a sweep: the only room with Optuna."""
