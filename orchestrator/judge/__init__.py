"""Judges of completions, and win rates computed from their preferences."""
