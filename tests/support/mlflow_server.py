"""A real MLflow server over a store of its own, an outbox that tells it of one trial, and stores that are copies."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from orchestrator.tracking import mlflow_client
from orchestrator.tracking.mlflow_client import database_path, tracking_uri
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.mlflow_ui import UiServer, start_ui
from orchestrator.tracking.outbox import Outbox

make_database = mlflow_client.create_mlflow_database
"""The driver's own, for the tests of it."""


def copied_databases(template: Path) -> Callable[[str], None]:
    """In its place: the database that is at `template` once the first one was asked for, copied."""

    def create(uri: str) -> None:
        path = database_path(uri)
        if path.exists():
            return
        make_database(f"sqlite:///{template}")
        temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.copy")
        shutil.copy(template, temporary)
        with suppress(FileExistsError):  # another process was first
            os.link(temporary, path)
        temporary.unlink()

    return create


@contextmanager
def serving(runs: Path) -> Generator[UiServer]:
    ui = start_ui(runs, tracking_uri(runs, f"sqlite:///{runs / 'mlflow.db'}"))
    try:
        yield ui
    finally:
        ui.stop()


def receiver(runs: Path, uri: str) -> MlflowReceiver:
    return MlflowReceiver(runs, uri=uri, experiment="e", sweep_id="id", sweep="s")


def begin(box: Outbox) -> None:
    box.start_run("sweep", name="s", params={}, tags={}, at=1.0)
    box.start_run("0", name="s 0", params={"loss.beta": 2.0}, tags={}, at=1.0)


def steps(runs: Path) -> list[int]:
    with sqlite3.connect(runs / "mlflow.db") as store:
        return [row[0] for row in store.execute("select step from metrics where key = 'loss' order by step")]
