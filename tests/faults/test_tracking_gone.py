"""Case 16: a tracking server that dies or hangs holds no trial up, and gets every point once when it is back."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from orchestrator.tracking.mlflow_ui import UiServer, start_ui
from orchestrator.tracking.outbox import Outbox
from tests.support.mlflow_server import begin, receiver, steps
from tests.support.processes import LIMIT_SECONDS, wait_until
from trainer.results import StepMetrics


@pytest.mark.faults
def test_a_server_killed_and_started_again_gets_every_point_once(runs: Path, ui: UiServer) -> None:
    port, box = int(ui.base.rpartition(":")[2]), Outbox(runs / "outbox", receiver(runs, ui.base))
    begin(box)
    for step in range(5):
        box.log_metrics("0", [StepMetrics(step, {"loss": 1.0})], at=float(step))
    wait_until(lambda: len(steps(runs)) >= 2)
    for process in [*psutil.Process(ui.process.pid).children(recursive=True), psutil.Process(ui.process.pid)]:
        process.kill()
    ui.process.wait()
    for step in range(5, 20):
        box.log_metrics("0", [StepMetrics(step, {"loss": 1.0})], at=float(step))
    wait_until(lambda: box.delivery_error)
    assert box.pending >= 15, "telling did not wait for the server"
    again = start_ui(runs, f"sqlite:///{runs / 'mlflow.db'}", port=port)
    try:
        assert box.close(LIMIT_SECONDS) == 0
        assert steps(runs) == list(range(20))
    finally:
        again.stop()


@pytest.mark.faults
def test_a_server_that_hangs_holds_nobody_and_gets_the_rest_later(
    runs: Path, ui: UiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    box = Outbox(runs / "outbox", receiver(runs, ui.base))
    begin(box)
    box.log_metrics("0", [StepMetrics(0, {"loss": 1.0})], at=0.0)
    wait_until(lambda: steps(runs))
    tree = [ui.process.pid, *(p.pid for p in psutil.Process(ui.process.pid).children(recursive=True))]
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    for step in range(1, 50):
        box.log_metrics("0", [StepMetrics(step, {"loss": 1.0})], at=float(step))
    assert box.close(1.0) >= 48, "neither telling nor closing waited for the server"
    for pid in tree:
        os.kill(pid, signal.SIGCONT)
    assert Outbox(runs / "outbox", receiver(runs, ui.base)).close(LIMIT_SECONDS) == 0
    assert steps(runs) == list(range(50))
