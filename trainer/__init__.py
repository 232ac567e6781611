"""One training run: preference tuning of one causal language model. Independent of sweeps."""
