"""Case 18: MLflow answers this machine only, no foreign host name, runs no jobs, and is not an old one."""

import urllib.error
import urllib.request
from importlib.metadata import requires, version
from pathlib import Path

import psutil
import pytest

from orchestrator.tracking.mlflow_ui import NotLoopback, UiServer, start_ui, sweep_page
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.run_metadata import trials_filter
from tests.support.mlflow_server import begin, receiver
from tests.support.processes import LIMIT_SECONDS
from trainer.results import StepMetrics


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_are_not_served(runs: Path, host: str) -> None:
    with pytest.raises(NotLoopback, match="ssh -L"):
        start_ui(runs, "sqlite:///x.db", host=host)
    assert not runs.exists()


def test_the_page_answers_on_loopback_only_and_its_filter_finds_the_runs(runs: Path, ui: UiServer) -> None:
    from mlflow import MlflowClient

    box = Outbox(runs / "outbox", receiver(runs, ui.base))
    begin(box)
    box.log_metrics("0", [StepMetrics(1, {"loss": float("nan"), "rewards/margins": float("inf")})], at=2.0)
    box.end_run("0", status="FAILED", tags={"reason": "diverged"}, at=3.0)
    assert box.close(LIMIT_SECONDS) == 0
    with urllib.request.urlopen(ui.base) as page:
        assert b"<html" in page.read().lower()
    tree = [psutil.Process(ui.process.pid), *psutil.Process(ui.process.pid).children(recursive=True)]
    listening = {c.laddr.ip for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert not any("mlflow.db" in argument for p in tree for argument in p.cmdline())
    page_of_sweep = sweep_page(ui.base, runs, ui.base, "e", "s", ("mlflow.sharedViewState.prefsweep-s", "{}"))
    number = page_of_sweep.split("/experiments/")[1].split("/")[0]
    assert "mlflow.sharedViewState.prefsweep-s" in MlflowClient(ui.base).get_experiment(number).tags
    found = MlflowClient(ui.base).search_runs([number], trials_filter("id"))
    assert sorted(run.info.status for run in found) == ["FAILED"]
    request = urllib.request.Request(f"{ui.base}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


def test_the_version_is_pinned_to_one_without_the_known_holes() -> None:
    pinned = [r for r in requires("prefsweep") or () if r.startswith("mlflow")]
    assert pinned
    assert all("==" in r for r in pinned)
    assert tuple(int(part) for part in version("mlflow").split(".")[:2]) >= (3, 17)
