"""Tracking in MLflow through a durable outbox. The only package that imports MLflow."""
