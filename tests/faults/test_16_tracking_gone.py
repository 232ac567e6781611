"""Case 16: a tracking server that dies or hangs holds no trial up, and gets every point once when it is back."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.tracking.mlflow import MlflowReceiver, tracking_uri
from orchestrator.tracking.outbox import Outbox, deliver_pending
from orchestrator.tracking.ui import Ui, start_ui
from trainer.report import Point


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


@pytest.mark.faults
def test_a_server_killed_and_started_again_gets_every_point_once(root: Path, ui: Ui) -> None:
    port = int(ui.base.rpartition(":")[2])
    box = Outbox(root / "outbox", receiver(root, ui.base))
    begin(box)
    for step in range(5):
        box.points("0", [Point(step, {"loss": 1.0})], at=float(step))
    while len(steps(root)) < 2:
        time.sleep(0.05)
    assert ui.process is not None
    for process in [*psutil.Process(ui.process.pid).children(recursive=True), psutil.Process(ui.process.pid)]:
        process.kill()
    ui.process.wait()
    began = time.monotonic()
    for step in range(5, 20):
        box.points("0", [Point(step, {"loss": 1.0})], at=float(step))
    assert time.monotonic() - began < 5, "telling waited for the server"
    while not box.trouble:
        time.sleep(0.1)
    assert box.pending >= 15
    again = start_ui(root, f"sqlite:///{root / 'mlflow.db'}", port=port)
    try:
        assert box.close(120.0) == 0
        assert steps(root) == list(range(20))
    finally:
        again.stop()


@pytest.mark.faults
def test_a_server_that_hangs_holds_nobody_and_gets_the_rest_later(
    root: Path, ui: Ui, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    box = Outbox(root / "outbox", receiver(root, ui.base))
    begin(box)
    box.points("0", [Point(0, {"loss": 1.0})], at=0.0)
    while not steps(root):
        time.sleep(0.05)
    assert ui.process is not None
    tree = [ui.process.pid, *(p.pid for p in psutil.Process(ui.process.pid).children(recursive=True))]
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    for step in range(1, 50):
        box.points("0", [Point(step, {"loss": 1.0})], at=float(step))
    left = box.close(1.0)
    assert time.monotonic() - began < 10
    assert left >= 48
    for pid in tree:
        os.kill(pid, signal.SIGCONT)
    assert deliver_pending(root / "outbox", receiver(root, ui.base), 120.0) == 0
    assert steps(root) == list(range(50))
