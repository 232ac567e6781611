"""Pruning and divergence guard: pure functions of a trial's learning curve and of the visible trials."""
