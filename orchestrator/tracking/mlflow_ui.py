"""The MLflow UI of a tracking store, on loopback only."""

from __future__ import annotations

import os
import shlex
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
from orchestrator.tracking.tied_process import tied_command

UI_LOG = "mlflow-ui.log"
"""In the runs folder: the output of the server."""
_PRIVATE_HOST = "localhost"
START_TIMEOUT = 600.0
"""Seconds a server may take to answer for the first time."""
_STOP_TIMEOUT = 20.0
"""Seconds a server may take to end before it is killed."""
_FREE_PORTS_TRIED = 3


class NotLoopback(OrchestrateError):
    """MLflow has no authentication: everyone who can connect can read and delete everything."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"the MLflow page is served on this machine only, not on {host}; from another machine use a tunnel: "
            "ssh -L 5000:127.0.0.1:5000 THIS_MACHINE"
        )


class PortInUse(OrchestrateError):
    """Another program listens on the port; its pages would be taken for MLflow's of this runs folder."""

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} is used by another program: --port OTHER, or --port 0 for any free one")


@dataclass(frozen=True, slots=True)
class UiServer:
    """A running MLflow UI. `process` is None if an existing tracking server shows the store."""

    base: str
    process: subprocess.Popen[bytes] | None
    uri: str
    """Tracking URI of the store that is shown: of a copy where the store may not be written."""
    copy: tempfile.TemporaryDirectory[str] | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None
    """Has the socket of a server that listens on no port; only this user may enter it."""

    @property
    def socket(self) -> Path | None:
        """The Unix socket on which it listens; None for a port."""
        return None if self.folder is None else Path(self.folder.name) / "mlflow.sock"

    def stop(self) -> None:
        """End the server if this program started it, and remove the copy of the store."""
        if self.process is not None:
            assert self.process.stdin is not None
            with suppress(OSError):  # it has ended
                self.process.stdin.close()
            self.process.wait()
        for folder in (self.copy, self.folder):
            if folder is not None:
                folder.cleanup()


def start_ui(root: Path, uri: str, host: str = "127.0.0.1", port: int = 0) -> UiServer:
    """Serve the MLflow UI of the store at `uri`; return when it responds. A tracking server has its own UI.

    A local store that this user may not write is served as a copy of its present state, as MLflow writes when it opens
    one. The server ends with this program, however that ends.

    Args:
        root: The runs folder.
        uri: MLflow's tracking URI.
        host: A loopback address.
        port: 0 for any free port.

    Raises:
        NotLoopback: `host` is no loopback address.
        PortInUse: Another program listens on `port`.
        StorageRefused: The store cannot be opened, or the server did not start.
    """
    if uri.startswith(("http://", "https://")):
        return UiServer(without_credentials(uri).rstrip("/"), None, uri)
    if not is_loopback(host):
        raise NotLoopback(host)
    if port and not _is_free(host, port):
        raise PortInUse(port)
    copy = _copy_to_read(root, uri) if is_local(uri) and not _is_writable(database_path(uri)) else None
    uri = uri if copy is None else f"sqlite:///{copy.name}/mlflow.db"
    try:
        connect(root, uri)
    except (TrackingUnavailable, MessageRejected) as error:
        raise StorageRefused(f"the tracking store {redact(uri)} refused: {error}") from error
    log = (root if copy is None else Path(copy.name)) / UI_LOG
    tries = 1 if port else _FREE_PORTS_TRIED
    while True:
        chosen, tries = port or _free_port(host), tries - 1
        process = _launch(root, uri, log, ["--host", host, "--port", str(chosen)])
        ui = UiServer(f"http://{host}:{chosen}", process, uri, copy)
        if _answers(ui):
            return ui
        if not tries or process.poll() is None or _is_free(host, chosen):  # else another program took the port first
            ui.stop()
            raise StorageRefused(f"the MLflow server did not start; its output is in {log}")


def launch_private_ui(root: Path, uri: str, prefix: str) -> UiServer:
    """Start the MLflow UI of a store for this program alone; it answers after some seconds.

    It listens on a Unix socket in a folder that only this user may enter, and ends with this program. This program
    imports nothing of MLflow.

    Args:
        root: The runs folder.
        uri: MLflow's tracking URI, of a database.
        prefix: Path below which the UI is, such as /mlflow.

    Raises:
        StorageRefused: The store does not exist yet.
    """
    if is_local(uri):
        database = database_path(uri)
        if not database.is_file():
            raise StorageRefused("nothing has been logged to MLflow yet: its store is made by the first sweep")
        adopt_artifacts(database, root)
    folder = tempfile.TemporaryDirectory(
        prefix="prefsweep-mlflow-"
    )  # a runs folder's path may be too long for a socket
    listen = shlex.join(["--uds", str(Path(folder.name) / "mlflow.sock")])
    more = ["--static-prefix", prefix, "--uvicorn-opts", listen, "--allowed-hosts", _PRIVATE_HOST]
    process = _launch(root, uri, root / UI_LOG, more)
    return UiServer(f"http://{_PRIVATE_HOST}{prefix}", process, uri, folder=folder)


def _launch(root: Path, uri: str, log: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    # In the environment, as a store's URI may contain a password and all users can read a process's arguments.
    environment = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS_DESTINATION": (root.resolve() / ARTIFACTS).as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *options]
    with log.open("wb") as stream:
        return subprocess.Popen(
            tied_command(_STOP_TIMEOUT, command),
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


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


def _answers(ui: UiServer) -> bool:
    """Return whether the server answers, once it does or has ended."""
    import httpx2

    assert ui.process is not None
    deadline = time.monotonic() + START_TIMEOUT
    with httpx2.Client(timeout=2, **client_options(ui.base)) as client:
        while time.monotonic() < deadline and ui.process.poll() is None:
            with suppress(httpx2.HTTPError):
                if client.get(f"{ui.base}/health").is_success:
                    return True
            time.sleep(0.1)
    return False


def _probe(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _free_port(host: str) -> int:
    with _probe(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with _probe(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended a moment ago do not count
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
