"""The pages that a browser shows: sweeps, their charts, trials, a new sweep."""
