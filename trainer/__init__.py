"""One training run: preference tuning of one causal language model. Knows nothing of sweeps."""
