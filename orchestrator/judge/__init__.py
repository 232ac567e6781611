"""Judges of answers, and win rates from their preferences."""
