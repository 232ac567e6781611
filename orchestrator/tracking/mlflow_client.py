"""Atomic creation of MLflow's SQLite database: interrupted migrations leave a database that cannot be opened."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from sqlalchemy import make_url

from trainer.storage.atomic_files import failpoint, file_lock, fsync


def create_mlflow_database(uri: str) -> None:
    """Create the SQLite database at `uri` with all tables if it does not exist: as a temporary file, then renamed."""
    path = Path(make_url(uri).database or "")
    if path.exists():
        return
    from mlflow import MlflowClient

    with file_lock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for stale in path.parent.glob(f".{path.name}.*.tmp*"):
            stale.unlink()  # of a process that was killed; no other process creates one, as this one has the lock
        temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        client = MlflowClient(f"sqlite:///{temporary}")
        client.search_experiments(max_results=1)
        client._tracking_client.store._dispose_engine()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        fsync(temporary)
        failpoint("mlflow.made")
        temporary.rename(path)
        fsync(path.parent)
