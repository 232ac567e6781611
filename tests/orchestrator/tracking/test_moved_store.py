"""MLflow's SQLite store in a runs folder that was moved, renamed or copied; and sweeps that share a name."""

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils

from dashboards.mlflow_pages import saved_view
from orchestrator.tracking.mlflow_client import connect, tracking_uri
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.run_metadata import trials_filter
from tests.support.specs import make_spec


def sink_in(root: Path, sweep_id: str = "id", **more: str) -> MlflowReceiver:
    return MlflowReceiver(root, uri=tracking_uri(root, None), experiment="a b/c", sweep_id=sweep_id, sweep="s", **more)


@pytest.fixture(autouse=True)
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow remembers in a process where a run's files are; a folder is moved between two processes."""
    monkeypatch.setattr(utils, "_artifact_repos_cache", Forgetful())


class Forgetful(OrderedDict[str, Any]):
    def get(self, key: str, default: Any = None) -> Any:
        return default


def attach(root: Path, name: str, **more: str) -> None:
    """What a driver attaches to the sweep's run."""
    root.mkdir(exist_ok=True)
    (root / name).write_text(name)
    sink = sink_in(root, **more)
    sink.start_run("sweep", name="s", params={}, tags={}, at=1.0)
    sink.log_artifact("sweep", root / name)


def files_of(root: Path) -> dict[str, Path]:
    """Where MLflow has the files of the only run, by name; MLflow gives each back."""
    client = connect(root, tracking_uri(root, None))
    experiment = client.get_experiment_by_name("a b/c")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    names = [file.path for file in client.list_artifacts(run.info.run_id)]
    for name in names:
        assert Path(client.download_artifacts(run.info.run_id, name)).read_text() == name
    folder = Path(url2pathname(urlsplit(run.info.artifact_uri).path))
    return {name: folder / name for name in names}


def test_artifacts_follow_a_runs_folder_that_was_renamed(tmp_path: Path) -> None:
    attach(tmp_path / "old", "before.txt")
    (tmp_path / "old").rename(tmp_path / "new")
    attach(tmp_path / "new", "after.txt")
    found = files_of(tmp_path / "new")
    assert sorted(found) == ["after.txt", "before.txt"]
    assert all(path.is_relative_to(tmp_path / "new" / "artifacts") for path in found.values())
    assert not (tmp_path / "old").exists(), "nothing is written where the folder was"


def test_a_copy_has_its_own_artifacts_and_the_first_folder_keeps_its(tmp_path: Path) -> None:
    attach(tmp_path / "one", "before.txt")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    attach(tmp_path / "two", "after.txt")
    assert {name: path.is_relative_to(tmp_path / "two") for name, path in files_of(tmp_path / "two").items()} == {
        "before.txt": True,
        "after.txt": True,
    }
    assert list(files_of(tmp_path / "one")) == ["before.txt"]


def test_a_location_that_the_file_names_stays(tmp_path: Path) -> None:
    far = f"file://{tmp_path}/far/artifacts"
    attach(tmp_path / "old", "before.txt", artifacts=far)
    (tmp_path / "old").rename(tmp_path / "new")
    attach(tmp_path / "new", "after.txt", artifacts=far)
    assert all(path.is_relative_to(tmp_path / "far") for path in files_of(tmp_path / "new").values())


def test_the_page_of_a_sweep_shows_none_of_a_deleted_one_of_the_same_name(tmp_path: Path) -> None:
    for sweep_id in ("first", "second"):
        sink = sink_in(tmp_path, sweep_id)
        for run in ("sweep", "0", "1"):
            sink.start_run(run, name=f"{sweep_id} {run}", params={}, tags={}, at=1.0)
    client = MlflowClient(tracking_uri(tmp_path, None))
    experiment = client.get_experiment_by_name("a b/c")
    assert experiment is not None
    shown = client.search_runs([experiment.experiment_id], trials_filter("second"))
    assert sorted(run.info.run_name for run in shown) == ["second 0", "second 1"]
    views = [saved_view(make_spec(), sweep_id, 1.0) for sweep_id in ("first", "second")]
    assert views[0][0] != views[1][0]
