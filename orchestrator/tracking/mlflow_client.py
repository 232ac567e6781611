"""Creation of MLflow's database: its migrations, killed half-way, leave a database that never opens again."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from sqlalchemy import make_url

from trainer.storage.atomic_files import FileLock, failpoint, fsync


def create_mlflow_database(uri: str) -> None:
    """Have the SQLite database at `uri` there with all its tables: made aside by one process, then given its name."""
    path = Path(make_url(uri).database or "")
    if path.exists():
        return
    from mlflow import MlflowClient

    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for left in path.parent.glob(f".{path.name}.*.tmp*"):
            left.unlink()  # of a process that died while it made it: we hold the lock
        temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        client = MlflowClient(f"sqlite:///{temporary}")
        client.search_experiments(max_results=1)
        client._tracking_client.store._dispose_engine()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        fsync(temporary)
        failpoint("mlflow.made")
        temporary.rename(path)
        fsync(path.parent)
