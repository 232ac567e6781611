"""The search space: dimensions, conditions, grids, trials enqueued by users."""
