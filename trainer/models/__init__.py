"""The live model: loaded once, restored between trials, exported at the end."""
