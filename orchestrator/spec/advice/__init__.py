"""Advice before training: published ranges and formulas over the initial model's log-probs."""
