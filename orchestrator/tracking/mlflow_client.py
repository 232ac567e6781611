"""The MLflow store: its URI, a client, the experiment, and MLflow's errors.

MLflow's SQLite database is created atomically: interrupted migrations leave a database that cannot be opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

from orchestrator.interfaces import MessageRejected, TrackingUnavailable
from orchestrator.redaction import redact
from orchestrator.tracking.artifact_locations import adopt_artifacts, default_location
from orchestrator.tracking.run_metadata import TRAINING_EXPERIMENT
from trainer.storage.atomic_files import fsync
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Errors that a retry cannot fix. All others (server down, slow, locked, disk full, access denied) are retried.
_PERMANENT_ERRORS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
)
# Timeouts of the delivery thread for a server that hangs; no trial waits for it. Values set by the user are kept.
_HTTP_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


URI_VARIABLE = "MLFLOW_TRACKING_URI"


def tracking_uri(root: Path, uri: str | None) -> str:
    """Return MLflow's tracking URI: the spec's `tracking.uri`, else $MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    return configured_store(uri) or default_store(root)


def configured_store(uri: str | None) -> str | None:
    """Return `uri` or $MLFLOW_TRACKING_URI, a relative SQLite file made absolute; None without either."""
    given = uri or os.environ.get(URI_VARIABLE) or None
    scheme, mark, path = (given or "").partition(":///")
    if given is None or not scheme.startswith("sqlite") or not mark or path.startswith("/") or not path:
        return given
    return f"{scheme}:///{Path.cwd() / path}"  # the next driver may start in another folder


def default_store(root: Path) -> str:
    """Return the URI of the runs folder's own store."""
    return f"sqlite:///{root.resolve() / 'mlflow.db'}"


def is_local(uri: str) -> bool:
    """Return whether the store is a SQLite database of this machine, with artifacts as files beside it."""
    return uri.startswith("sqlite:")


def database_path(uri: str) -> Path:
    """Return the file of a local store."""
    from sqlalchemy import make_url

    return Path(make_url(uri).database or "")


def connect(root: Path, uri: str) -> MlflowClient:
    """Return a client after creating the store if needed. The driver calls it first, as migrations must not run twice.

    Raises TrackingUnavailable or MessageRejected.
    """
    for name, value in _HTTP_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # The outbox reports errors once; MLflow would log a traceback per retry.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if is_local(uri):
        root.mkdir(parents=True, exist_ok=True)
    with translate_errors():
        if is_local(uri):
            create_mlflow_database(uri)
            adopt_artifacts(database_path(uri), root)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def ensure_experiment(client: MlflowClient, root: Path, uri: str, name: str, artifacts: str | None = None) -> str:
    """Return the id of the experiment `name`; create it if needed, with its artifacts below the URL `artifacts`."""
    from mlflow.exceptions import MlflowException

    with translate_errors():
        found = client.get_experiment_by_name(name)
        if found is None:
            location = default_location(root, name) if is_local(uri) else None
            location = location if artifacts is None else artifact_location(artifacts, name)
            try:
                return client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)
                assert found is not None
        return found.experiment_id


def artifact_location(artifacts: str, experiment: str) -> str:
    """Return the artifact location of an experiment below the URL `artifacts`."""
    return f"{artifacts}/{quote(experiment, safe='')}"


def fixed_artifact_location(root: Path, uri: str, experiment: str, artifacts: str) -> str | None:
    """Return the artifact location of an existing experiment if it is not below `artifacts`; it cannot be changed.

    None if the experiment does not exist or is below `artifacts`. Raises TrackingUnavailable.
    """
    if is_local(uri) and not database_path(uri).is_file():
        return None
    client = connect(root, uri)
    with translate_errors():
        found = client.get_experiment_by_name(experiment)
    if found is None or found.artifact_location == artifact_location(artifacts, experiment):
        return None
    return str(found.artifact_location)


def save_view(client: MlflowClient, experiment_id: str, view: tuple[str, str]) -> None:
    """Set the saved view of charts (tag and value) of an experiment; the newest one counts."""
    with translate_errors():
        client.set_experiment_tag(experiment_id, *view)
        client.set_experiment_tag(experiment_id, *TRAINING_EXPERIMENT)


def create_mlflow_database(uri: str) -> None:
    """Create the SQLite database at `uri` with all tables if it does not exist: as a temporary file, then renamed."""
    path = database_path(uri)
    if path.exists():
        return
    from mlflow import MlflowClient

    with FileLock(path.with_name(f".{path.name}.lock")):
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


@contextmanager
def translate_errors() -> Generator[None]:
    """Raise MLflow's errors as MessageRejected or TrackingUnavailable."""
    import sqlite3

    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except MlflowException as error:
        kind = MessageRejected if error.error_code in _PERMANENT_ERRORS else TrackingUnavailable
        raise kind(redact(str(error))) from error
    except (OSError, DBAPIError, sqlite3.Error) as error:  # requests' errors are OSErrors
        raise TrackingUnavailable(redact(str(error))) from error
