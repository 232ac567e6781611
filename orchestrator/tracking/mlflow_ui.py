"""The MLflow UI of a tracking store, on loopback only."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from orchestrator.errors import OrchestrateError, StorageRefused
from orchestrator.interfaces import MessageRejected, TrackingUnavailable
from orchestrator.loopback import client_options, is_loopback
from orchestrator.redaction import redact, without_credentials
from orchestrator.tracking.artifact_locations import ARTIFACTS, adopt_artifacts
from orchestrator.tracking.mlflow_client import connect, database_path, ensure_experiment, is_local, save_view
from orchestrator.tracking.run_metadata import charts_page

START_TIMEOUT = 180.0
"""Seconds a server may take to answer for the first time."""


class NotLoopback(OrchestrateError):
    """MLflow has no authentication: everyone who can connect can read and delete everything."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"the MLflow page is served on this machine only, not on {host}; from another machine use a tunnel: "
            "ssh -L 5000:127.0.0.1:5000 THIS_MACHINE"
        )


@dataclass(frozen=True, slots=True)
class UiServer:
    """A running MLflow UI. `process` is None if an existing tracking server shows the store."""

    base: str
    process: subprocess.Popen[bytes] | None
    uri: str
    """Tracking URI of the store that is shown: of a copy where the store may not be written."""
    copy: tempfile.TemporaryDirectory[str] | None = None

    def stop(self) -> None:
        """Terminate the server if this program started it, and remove the copy of the store."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=20)
        if self.copy is not None:
            self.copy.cleanup()


def start_ui(root: Path, uri: str, host: str = "127.0.0.1", port: int = 0) -> UiServer:
    """Serve the MLflow UI of the store at `uri`; return when it responds. A tracking server has its own UI.

    A local store that this user may not write is served as a copy of its present state, as MLflow writes when it opens
    one.

    Args:
        root: The runs folder.
        uri: MLflow's tracking URI.
        host: A loopback address.
        port: 0 for any free port.

    Raises:
        NotLoopback: `host` is no loopback address.
        StorageRefused: The store cannot be opened, or the server did not start.
    """
    if uri.startswith(("http://", "https://")):
        return UiServer(without_credentials(uri).rstrip("/"), None, uri)
    if not is_loopback(host):
        raise NotLoopback(host)
    copy = _copy_to_read(root, uri) if is_local(uri) and not _is_writable(database_path(uri)) else None
    uri = uri if copy is None else f"sqlite:///{copy.name}/mlflow.db"
    try:
        connect(root, uri)
    except (TrackingUnavailable, MessageRejected) as error:
        raise StorageRefused(f"the tracking store {redact(uri)} refused: {error}") from error
    port = port or _free_port(host)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    # In the environment, as a store's URI may contain a password and all users can read a process's arguments.
    environment = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS_DESTINATION": (root.resolve() / ARTIFACTS).as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    log = (root if copy is None else Path(copy.name)) / "mlflow-ui.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=stream, stderr=subprocess.STDOUT)
    ui = UiServer(f"http://{host}:{port}", process, uri, copy)
    _wait(ui, log)
    return ui


def _is_writable(database: Path) -> bool:
    if not database.parent.exists():  # made by the first write
        return True
    return os.access(database.parent, os.W_OK) and (not database.exists() or os.access(database, os.W_OK))


def _copy_to_read(root: Path, uri: str) -> tempfile.TemporaryDirectory[str] | None:
    """Copy a store of another user into a temporary folder. Raises StorageRefused if it cannot be read."""
    database = database_path(uri)
    folder = tempfile.TemporaryDirectory(prefix="orchestrate-ui-")
    copied = Path(folder.name) / "mlflow.db"
    try:
        with (
            closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copied)) as target,
        ):
            source.backup(target)
        adopt_artifacts(copied, root, home=database.parent)
    except sqlite3.Error as error:
        folder.cleanup()
        raise StorageRefused(f"the tracking store {redact(uri)} cannot be read: {error}") from error
    return folder


def sweep_page(
    base: str, root: Path, uri: str, experiment: str, sweep_id: str, view: tuple[str, str], artifacts: str | None = None
) -> str:
    """Return the URL of a sweep's charts and trials, after setting `view` as the experiment's saved view."""
    try:
        client = connect(root, uri)
        number = ensure_experiment(client, root, uri, experiment, artifacts)
        save_view(client, number, view)
    except (TrackingUnavailable, MessageRejected) as error:
        raise StorageRefused(f"the tracking store {redact(uri)} refused: {error}") from error
    return f"{base}/#{charts_page(number, sweep_id)}"


def _wait(ui: UiServer, log: Path) -> None:
    import httpx2

    assert ui.process is not None
    deadline = time.monotonic() + START_TIMEOUT
    with httpx2.Client(timeout=2, **client_options(ui.base)) as client:
        while time.monotonic() < deadline and ui.process.poll() is None:
            with suppress(httpx2.HTTPError):
                if client.get(f"{ui.base}/health").is_success:
                    return
            time.sleep(0.1)
    ui.stop()
    raise StorageRefused(f"the MLflow server did not start; its output is in {log}")


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
