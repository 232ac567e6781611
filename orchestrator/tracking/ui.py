"""The MLflow page of a store, on this machine only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from orchestrator.errors import OrchestrateError, StorageRefused
from orchestrator.spec.sweep import Goal
from orchestrator.tracking.mlflow import RUN, SWEEP_NAME, connect, ensure_experiment
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.sink import SWEEP, Refused, Unreachable

PATIENCE = 180.0
"""Seconds a server may take to answer for the first time."""


class NotLoopback(OrchestrateError):
    """MLflow has no passwords: whoever reaches it can read and delete everything."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"the MLflow page is served on this machine only, not on {host}; from elsewhere use a tunnel: "
            "ssh -L 5000:127.0.0.1:5000 THIS_MACHINE"
        )


@dataclass(frozen=True, slots=True)
class Ui:
    """A page that answers. `process` is None where somebody else's server shows the store."""

    base: str
    process: subprocess.Popen[bytes] | None

    def stop(self) -> None:
        """End our server."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=20)


def start_ui(root: Path, uri: str, host: str = "127.0.0.1", port: int = 0) -> Ui:
    """Serve the store at `uri`; returns when it answers. Port 0: any free one. A tracking server has its own page."""
    if uri.startswith(("http://", "https://")):
        return Ui(_without_credentials(uri), None)
    if not is_loopback(host):
        raise NotLoopback(host)
    try:
        connect(root, uri)
    except (Unreachable, Refused) as error:
        raise StorageRefused(f"the tracking store {redact(uri)} refused: {error}") from error
    port = port or _free_port(host)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    # By environment, not by argument: a store's URI may carry a password, and every user may read arguments.
    asked = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS_DESTINATION": (root.resolve() / "artifacts").as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    log = root / "mlflow-ui.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=os.environ | asked, stdout=stream, stderr=subprocess.STDOUT)
    ui = Ui(f"http://{host}:{port}", process)
    _wait(ui, log)
    return ui


def runs_url(base: str, experiment_id: str, sweep: str, goal: Goal) -> str:
    """The page with the trials of one sweep, the best one first."""
    asked = {
        "workflowType": "machine_learning",
        "searchFilter": f"tags.`{SWEEP_NAME}` = '{sweep}' and tags.`{RUN}` != '{SWEEP}'",
        "orderByKey": f"metrics.`{goal.metric}`",
        "orderByAsc": str(goal.direction == "minimize").lower(),
    }
    return f"{base}/#/experiments/{experiment_id}/runs?{urlencode(asked, quote_via=quote, safe='')}"


def experiment_id(root: Path, uri: str, experiment: str) -> str:
    """The id under which MLflow shows the experiment of that name."""
    try:
        return ensure_experiment(connect(root, uri), root, uri, experiment)
    except (Unreachable, Refused) as error:
        raise StorageRefused(f"the tracking store {redact(uri)} refused: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _wait(ui: Ui, log: Path) -> None:
    assert ui.process is not None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and ui.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{ui.base}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    ui.stop()
    raise StorageRefused(f"the MLflow server did not come up; its words are in {log}")


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
