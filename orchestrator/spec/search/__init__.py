"""The search space: distributions, conditions, grids and checks of trials that users enqueue."""
