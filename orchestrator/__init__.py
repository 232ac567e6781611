"""Sweeps: many training runs, proposed by a sampler, executed on Ray, recorded in a study and in MLflow."""
