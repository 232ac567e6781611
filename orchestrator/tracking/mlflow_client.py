"""The MLflow store: its URI, a client, the experiment, and MLflow's errors.

MLflow's database is created aside and renamed: migrations that were killed half-way leave one that never opens again.
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
from orchestrator.tracking.run_metadata import TRAINING_EXPERIMENT
from trainer.storage.atomic_files import FileLock, failpoint, fsync

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What no repetition will mend. Anything else (down, slow, locked, full, not allowed in) is tried again.
_PERMANENT_ERRORS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
)
# A server that hangs costs the delivery thread this long, never a trial. Whoever sets these knows better.
_HTTP_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracking_uri(root: Path, uri: str | None) -> str:
    """Where MLflow is: the spec's `tracking.uri`, else MLFLOW_TRACKING_URI, else a database in the runs folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def is_local(uri: str) -> bool:
    """Whether the store is a database we reach ourselves, with artifacts as files beside it."""
    return uri.startswith("sqlite:")


def connect(root: Path, uri: str) -> MlflowClient:
    """A client whose store exists. Called once from the driver before anyone else: migrations do not like company."""
    for name, value in _HTTP_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Its errors reach the user in our words, once, and not as a traceback per try.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if is_local(uri):
        root.mkdir(parents=True, exist_ok=True)
    with translate_errors():
        if is_local(uri):
            create_mlflow_database(uri)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def ensure_experiment(client: MlflowClient, root: Path, uri: str, name: str, artifacts: str | None = None) -> str:
    """The id of the experiment called `name`, made if there is none; then its files go below the URL `artifacts`."""
    from mlflow.exceptions import MlflowException

    with translate_errors():
        found = client.get_experiment_by_name(name)
        if found is None:
            location = (root.resolve() / "artifacts" / name).as_uri() if is_local(uri) else None
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
    """Where an experiment's files go below the URL `artifacts`."""
    return f"{artifacts}/{quote(experiment, safe='')}"


def fixed_artifact_location(root: Path, uri: str, experiment: str, artifacts: str) -> str | None:
    """Where the experiment keeps its files if that is not below `artifacts`: for good, since it was made.

    None where it is not made yet; TrackingUnavailable where the store does not say.
    """
    from sqlalchemy import make_url

    if is_local(uri) and not Path(make_url(uri).database or "").is_file():
        return None
    client = connect(root, uri)
    with translate_errors():
        found = client.get_experiment_by_name(experiment)
    if found is None or found.artifact_location == artifact_location(artifacts, experiment):
        return None
    return str(found.artifact_location)


def save_view(client: MlflowClient, experiment_id: str, view: tuple[str, str]) -> None:
    """Put a saved view (tag and value) on an experiment; the newest one counts."""
    with translate_errors():
        client.set_experiment_tag(experiment_id, *view)
        client.set_experiment_tag(experiment_id, *TRAINING_EXPERIMENT)


def create_mlflow_database(uri: str) -> None:
    """Have the SQLite database at `uri` there with all its tables: made aside by one process, then given its name."""
    from sqlalchemy import make_url

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


@contextmanager
def translate_errors() -> Generator[None]:
    """MLflow's errors into the two that the outbox understands."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except MlflowException as error:
        kind = MessageRejected if error.error_code in _PERMANENT_ERRORS else TrackingUnavailable
        raise kind(redact(str(error))) from error
    except (OSError, DBAPIError) as error:  # requests' errors are OSErrors
        raise TrackingUnavailable(redact(str(error))) from error
