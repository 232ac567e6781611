"""The policy model: loaded once, reset between trials, exported at the end of a trial."""
