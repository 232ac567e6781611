"""A real MLflow server: the page on this machine only, and a server that dies or hangs while trials report."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.spec.sweep import Goal
from orchestrator.tracking.mlflow import MlflowReceiver, tracking_uri
from orchestrator.tracking.outbox import Outbox, deliver_pending
from orchestrator.tracking.ui import NotLoopback, Ui, experiment_id, runs_url, start_ui
from trainer.report import Point

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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_are_not_served(root: Path, host: str) -> None:
    with pytest.raises(NotLoopback, match="ssh -L"):
        start_ui(root, "sqlite:///x.db", host=host)
    assert not root.exists()


def test_a_tracking_server_shows_its_own_page(root: Path) -> None:
    ui = start_ui(root, "https://me:secret@tracking.example.org/")
    assert (ui.base, ui.process) == ("https://tracking.example.org", None)


def test_the_url_of_a_sweeps_runs() -> None:
    url = runs_url("http://127.0.0.1:5000", "3", "my-sweep", GOAL)
    page, asked = url.split("?")
    assert page == "http://127.0.0.1:5000/#/experiments/3/runs"
    wanted = dict(urllib.parse.parse_qsl(asked))
    assert wanted["searchFilter"] == "tags.`prefsweep.sweep` = 'my-sweep' and tags.`prefsweep.run` != 'sweep'"
    assert (wanted["orderByKey"], wanted["orderByAsc"]) == ("metrics.`eval_accuracies/logp`", "false")


def test_the_page_answers_on_loopback_only_and_its_filter_finds_the_runs(root: Path, ui: Ui) -> None:
    from mlflow import MlflowClient

    box = Outbox(root / "outbox", receiver(root, ui.base))
    begin(box)
    box.points("0", [Point(1, {"loss": float("nan"), "rewards/margins": float("inf")})], at=2.0)
    box.end("0", status="FAILED", tags={"reason": "diverged"}, at=3.0)
    assert box.close(60.0) == 0

    with urllib.request.urlopen(ui.base) as page:
        assert b"<html" in page.read().lower()
    assert ui.process is not None
    tree = [psutil.Process(ui.process.pid), *psutil.Process(ui.process.pid).children(recursive=True)]
    listening = {c.laddr.ip for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert not any("mlflow.db" in argument for p in tree for argument in p.cmdline())

    number = experiment_id(root, ui.base, "e")
    wanted = urllib.parse.unquote(runs_url(ui.base, number, "s", GOAL).split("searchFilter=")[1].split("&")[0])
    found = MlflowClient(ui.base).search_runs([number], wanted)
    assert sorted(run.info.status for run in found) == ["FAILED"]

    request = urllib.request.Request(f"{ui.base}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


@pytest.mark.slow
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


@pytest.mark.slow
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
