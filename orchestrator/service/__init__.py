"""The service: a queue of sweeps whose drivers outlive it, and who may use it."""

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8787
"""Where `orchestrate serve` listens."""
LARGEST_MODEL_GB = 50.0
"""The largest model folder that a person may send with a sweep."""
