"""Optuna's tables and the sweep's own tables, changed in one transaction."""
