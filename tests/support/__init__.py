"""Helpers of the tests, importable in every process that a test starts (`tests/conftest.py`)."""

from pathlib import Path

IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""Where folders cost no disk, for `tempfile`; None leaves it to the system."""
