"""`tracking.artifacts`: an experiment's files go below that URL, and MLflow itself gives them back."""

from pathlib import Path
from typing import Any

import pytest

import sweeps
from orchestrator.driver.preflight import check_remote_storage
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.mirror import MirrorError
from orchestrator.spec.loading.loader import load_spec
from orchestrator.tracking.mlflow_client import connect, fixed_artifact_location
from orchestrator.tracking.mlflow_receiver import MlflowReceiver

QUICKSTART = Path(sweeps.__file__).parent / "quickstart.yaml"


def _tell(root: Path, uri: str, artifacts: str) -> None:
    (root / "report.html").write_text("<p>the winner</p>")
    given: dict[str, Any] = {"uri": uri, "experiment": "a/b", "sweep_id": "7", "sweep": "s", "artifacts": artifacts}
    receiver = MlflowReceiver(root, **given)
    receiver.start_run(SWEEP_RUN, name="s", params={}, tags={}, at=1.0)
    receiver.start_run("0", name="trial 0", params={}, tags={}, at=1.0)
    for run in (SWEEP_RUN, "0"):
        receiver.log_artifact(run, root / "report.html")


def _given_back(root: Path, uri: str) -> list[str]:
    client = connect(root, uri)
    runs = client.search_runs([client.get_experiment_by_name("a/b").experiment_id])
    logged = [Path(client.download_artifacts(run.info.run_id, "report.html")) for run in runs]
    return [path.read_text() for path in logged]


def test_files_are_below_the_url_and_stay_where_the_experiment_has_them(tmp_path: Path, s3: Any) -> None:
    root, uri = tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db"
    root.mkdir()
    _tell(root, uri, f"{s3.url}/files")
    assert _given_back(root, uri) == ["<p>the winner</p>"] * 2
    from orchestrator.mirror import Mirror

    there = Mirror(f"{s3.url}/files").files()
    assert len(there) == 2
    assert all(name.startswith("a%2Fb/") and name.endswith("/artifacts/report.html") for name in there)
    assert not (root / "artifacts").exists()
    assert fixed_artifact_location(root, uri, "a/b", f"{s3.url}/files") is None
    assert fixed_artifact_location(root, uri, "other", f"file://{tmp_path}/far") is None
    assert fixed_artifact_location(root, uri, "a/b", f"file://{tmp_path}/far") == f"{s3.url}/files/a%2Fb"
    given = [f"tracking.uri={uri}", "tracking.experiment=a/b", f"tracking.artifacts=file://{tmp_path}/far"]
    with pytest.raises(MirrorError, match=r"set tracking\.experiment to another name"):
        check_remote_storage(load_spec(QUICKSTART, given), root)
