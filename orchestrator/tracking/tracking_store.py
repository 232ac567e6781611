"""A sweep's tracking URI: chosen when the sweep begins and kept in its folder; stores that MLflow refuses are found."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.folders import SweepFolder
from orchestrator.redaction import without_credentials
from orchestrator.tracking.mlflow_client import URI_VARIABLE, configured_store, default_store, tracking_uri
from trainer.storage.atomic_files import write_json

TRACKING_FILE = "tracking.json"
"""In the sweep's folder: the sweep file's `tracking.uri`, and the URI that it led to; null for runs/mlflow.db."""


def sweep_tracking_uri(folder: SweepFolder, uri: str | None) -> str:
    """Return the tracking URI that the sweep began with; `uri`: the spec's `tracking.uri`.

    An equal URI of the spec or the environment is preferred, as the stored one has no password.
    """
    stored = _read(folder)
    if stored is None or stored["given"] != _public(uri):
        return tracking_uri(folder.root, uri)
    current = configured_store(uri)
    if current is not None and _public(current) == stored["uri"]:
        return current
    return stored["uri"] or default_store(folder.root)


def settle_tracking_uri(folder: SweepFolder, uri: str | None) -> str:
    """Store the sweep's tracking URI, unless it is stored and `uri`, the spec's `tracking.uri`, has not changed.

    Returns:
        A message if the environment now names another store, else "".
    """
    stored, current = _read(folder), _public(configured_store(uri))
    if stored is None or stored["given"] != _public(uri):
        write_json(folder.path / TRACKING_FILE, {"given": _public(uri), "uri": current})
        return ""
    if uri is not None or current is None or current == stored["uri"]:
        return ""
    began = stored["uri"] or default_store(folder.root)
    return (
        f"tracking: ${URI_VARIABLE} is now {current}; {folder.name} stays with {began}, where it began "
        f"(--set tracking.uri={current} changes it)"
    )


def check_tracking_store(store: str, uri: str | None) -> None:
    """Check that MLflow can open the store; `uri`: the spec's `tracking.uri`, from which it may come.

    Raises:
        SpecError: it is a folder of files, which MLflow refuses since version 3.
    """
    if (problem := store_problem(store)) is not None:
        raise SpecError([SpecProblem("" if uri else f"${URI_VARIABLE}", "tracking.uri" if uri else "", *problem)])


def store_problem(store: str) -> tuple[str, str] | None:
    """Return why MLflow refuses the store, and what to do; None if it does not."""
    parts = urlsplit(store)
    if parts.scheme not in ("", "file") or os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    folder = Path(unquote(parts.path) if parts.scheme else store).absolute()
    database = f"sqlite:///{folder.parent / 'mlflow.db'}"
    hint = f"use {database}, or unset ${URI_VARIABLE} for mlflow.db in the runs folder"
    if importlib.util.find_spec("mlflow.store.fs2db") is not None:
        hint += f"; `mlflow migrate-filestore --source {folder} --target {database}` copies its runs"
    return f"{store} is a folder of files, which MLflow refuses since version 3", hint


def _public(uri: str | None) -> str | None:
    return None if uri is None else without_credentials(uri)


def _read(folder: SweepFolder) -> dict[str, Any] | None:
    path = folder.path / TRACKING_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
