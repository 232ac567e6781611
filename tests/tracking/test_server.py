"""A real MLflow server: the page on this machine only, and a server that dies or hangs while trials report."""

from __future__ import annotations

import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.spec.sweep import Goal
from orchestrator.tracking.mlflow import MlflowReceiver, tracking_uri
from orchestrator.tracking.names import charts_page
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.ui import Ui, start_ui

GOAL = Goal(metric="eval_accuracies/logp", direction="maximize")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def ui(root: Path) -> Iterator[Ui]:
    ui = start_ui(root, tracking_uri(root, f"sqlite:///{root / 'mlflow.db'}"))
    yield ui
    ui.stop()


def receiver(root: Path, uri: str) -> MlflowReceiver:
    return MlflowReceiver(root, uri=uri, experiment="e", sweep_id="id", sweep="s")


def begin(box: Outbox) -> None:
    box.start("sweep", name="s", params={}, tags={}, at=1.0)
    box.start("0", name="s 0", params={"loss.beta": 2.0}, tags={}, at=1.0)


def steps(root: Path) -> list[int]:
    with sqlite3.connect(root / "mlflow.db") as store:
        return [row[0] for row in store.execute("select step from metrics where key = 'loss' order by step")]


def test_a_tracking_server_shows_its_own_page(root: Path) -> None:
    ui = start_ui(root, "https://me:secret@tracking.example.org/")
    assert (ui.base, ui.process) == ("https://tracking.example.org", None)


def test_the_address_of_a_sweeps_charts() -> None:
    page, asked = charts_page("3", "my-sweep").split("?")
    assert page == "/experiments/3/runs"
    wanted = dict(urllib.parse.parse_qsl(asked))
    # Search words in the address would keep MLflow from loading the view: they are inside it.
    assert wanted == {
        "viewStateShareKey": "prefsweep-my-sweep",
        "compareRunsMode": "CHART",
        "workflowType": "machine_learning",
    }
