"""Shipped sweeps: one YAML file per setup."""
