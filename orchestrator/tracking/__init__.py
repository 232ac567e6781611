"""Tracking of trials in MLflow; the only package that imports it."""
