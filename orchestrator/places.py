"""Files of a sweep's folder that are written once, by name."""

DATA_FILE = "data.json"
"""What was found in the data."""
ENVIRONMENT_FILE = "environment.json"
"""Versions, hardware, commit."""
RUNS_FILE = "runs.json"
"""MLflow's run ids, by our names of runs."""
