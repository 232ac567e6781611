"""MLflow's runs of a sweep whose driver was killed, as the next command that looks at the sweep leaves them."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.cli import main
from orchestrator.driver import parent_run
from orchestrator.folders import SweepFolder, sweep_lock
from orchestrator.interfaces import TrackingUnavailable
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.run_metadata import RUN
from tests.support.local_driver import KILLED, drive, killed_at
from tests.support.processes import LIMIT_SECONDS
from tests.support.recorders import ListSink
from tests.support.specs import make_spec

SPEC = make_spec(3, tracking={"experiment": "e"})


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs folder of a sweep whose driver was killed in its second trial."""
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(parent_run, "_DELIVERY_SECONDS", LIMIT_SECONDS)
    assert killed_at(lambda: drive(tmp_path, SPEC), "trial.told:2") == KILLED
    folder = SweepFolder(tmp_path, "s")
    with Study.open(folder, read_only=True) as study:
        sink = MlflowReceiver(tmp_path, uri=tracking_uri(tmp_path, None), experiment="e", sweep_id=study.id, sweep="s")
    assert Outbox(folder.outbox, sink).close(LIMIT_SECONDS) == 0  # MLflow got what the driver had said
    return tmp_path


def statuses(root: Path) -> dict[str, str]:
    client = MlflowClient(tracking_uri(root, None))
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    return {run.data.tags[RUN]: run.info.status for run in client.search_runs([experiment.experiment_id])}


def tags_of(root: Path) -> dict[str, str]:
    client = MlflowClient(tracking_uri(root, None))
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    return client.search_runs([experiment.experiment_id], f"tags.`{RUN}` = 'sweep'")[0].data.tags


def test_the_next_command_ends_the_runs_of_a_killed_driver_and_a_resume_continues_them(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sweep_lock(SweepFolder(killed, "s")):
        assert main(["status", "s"]) == 0
    assert "RUNNING" in statuses(killed).values(), "while a driver holds the sweep its runs are left alone"
    assert "marked as interrupted" not in capsys.readouterr().err
    assert main(["status", "s"]) == 0
    assert "the driver of s has ended: its runs in MLflow are marked as interrupted" in capsys.readouterr().err
    assert "RUNNING" not in statuses(killed).values()
    assert (statuses(killed)["sweep"], tags_of(killed)["state"]) == ("KILLED", "INTERRUPTED")
    assert "killed, or its machine stopped" in tags_of(killed)["reason"]
    assert tags_of(killed)["mlflow.note.content"].startswith("**Interrupted**")
    assert main(["status", "s"]) == 0
    assert capsys.readouterr().err == "", "it is done once"
    drive(killed, SPEC)
    assert statuses(killed) == dict.fromkeys(("sweep", "0", "1", "2"), "FINISHED")
    assert main(["history", "s"]) == 0
    assert statuses(killed) == dict.fromkeys(("sweep", "0", "1", "2"), "FINISHED")


def test_an_end_that_mlflow_did_not_get_is_delivered_by_the_next_command(killed: Path) -> None:
    class Down(ListSink):
        def end_run(self, run: str, *, status: str, tags: object, at: float) -> None:
            raise TrackingUnavailable("down")

    box = Outbox(SweepFolder(killed, "s").outbox, Down())
    box.end_run("sweep", status="KILLED", tags={"state": "STOPPED"}, at=9e9)
    box.close(0.0)
    assert statuses(killed)["sweep"] == "RUNNING"
    assert main(["history", "s"]) == 0
    assert (statuses(killed)["sweep"], tags_of(killed)["state"]) == ("KILLED", "STOPPED")
