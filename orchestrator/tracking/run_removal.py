"""The MLflow runs of one sweep, found by their tag, and their deletion.

A store in the runs folder forgets them and their artifacts at once, as `mlflow gc` would. A server only marks them as
deleted: until its owner calls `mlflow gc` they can be restored, and no space is free.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from orchestrator.errors import StorageRefused
from orchestrator.folders import disk_usage
from orchestrator.interfaces import MessageRejected, TrackingUnavailable
from orchestrator.redaction import without_credentials
from orchestrator.tracking.mlflow_client import connect, database_path, is_local, translate_errors
from orchestrator.tracking.run_metadata import SWEEP_ID
from trainer.results import clause
from trainer.storage.failpoints import failpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGE = 1000
_GONE = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True, slots=True)
class SweepRuns:
    """MLflow's runs of a sweep: ids, the store, and the bytes of artifacts that are files of this machine."""

    ids: tuple[str, ...]
    store: str
    bytes: int
    stays_restorable: bool
    """The store is a server, which marks runs as deleted."""


def find_runs(root: Path, uri: str, experiment: str, sweep_id: str, also: Collection[str] = ()) -> SweepRuns:
    """Return the runs with the sweep's tag in the experiment, and those of `also` that the store has.

    Raises:
        StorageRefused: the store cannot be read.
    """
    store = without_credentials(uri)
    if is_local(uri) and not database_path(uri).is_file():
        return SweepRuns((), store, 0, stays_restorable=False)
    client = _connect(root, uri)
    found: dict[str, str] = {}
    with _refusals(uri), translate_errors():
        known = client.get_experiment_by_name(experiment)
        token: str | None = None
        while known is not None and sweep_id:
            page = client.search_runs(
                [known.experiment_id], f"tags.`{SWEEP_ID}` = '{sweep_id}'", max_results=_PAGE, page_token=token
            )
            found |= {run.info.run_id: run.info.artifact_uri or "" for run in page}
            if not (token := page.token):
                break
        for run_id in set(also) - found.keys():
            if (run := _run(client, run_id)) is not None:
                found[run_id] = run.info.artifact_uri or ""
    folders = [folder for uri_of_run in found.values() if (folder := _local(uri_of_run)) is not None]
    return SweepRuns(
        tuple(sorted(found)), store, sum(disk_usage(f) for f in folders), stays_restorable=not is_local(uri)
    )


def delete_runs(root: Path, uri: str, ids: Collection[str]) -> int:
    """Delete these runs with their artifacts and return how many were left to delete; those already gone are passed.

    Raises:
        StorageRefused: the store refused; the call can be repeated.
    """
    if not ids or (is_local(uri) and not database_path(uri).is_file()):
        return 0
    client, deleted = _connect(root, uri), 0
    for run_id in ids:
        with _refusals(uri), translate_errors():
            run = _run(client, run_id)
            if run is None:
                continue
            if run.info.lifecycle_stage != "deleted":
                client.delete_run(run_id)
                deleted += 1
            failpoint("mlflow.run-deleted")
            if is_local(uri):
                _forget(client, run)
    return deleted


def _forget(client: MlflowClient, run: Any) -> None:
    """Remove the artifacts and rows of a deleted run, in the order of `mlflow gc`."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    folder = _local(run.info.artifact_uri or "")
    if folder is None or folder.parent.name != run.info.run_id:
        get_artifact_repository(run.info.artifact_uri).delete_artifacts()
    elif folder.parent.exists():
        shutil.rmtree(folder.parent)
    store = client._tracking_client.store  # pyright: ignore[reportPrivateUsage]
    store._hard_delete_run(run.info.run_id)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _run(client: MlflowClient, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == _GONE:
            return None
        raise


def _local(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") and parts.path else None


def _connect(root: Path, uri: str) -> MlflowClient:
    with _refusals(uri):
        return connect(root, uri)


@contextmanager
def _refusals(uri: str) -> Generator[None]:
    """Raise what MLflow refuses as StorageRefused."""
    try:
        yield
    except (TrackingUnavailable, MessageRejected) as error:
        raise StorageRefused(f"MLflow at {without_credentials(uri)} refused: {clause(error)}") from error
