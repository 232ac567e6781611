"""The truth about a sweep; the only package that imports Optuna."""
