"""The service: a queue of sweeps whose drivers outlive it, and who may use it."""

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8787
"""Where `orchestrate serve` listens."""
