"""The tracking URI of a sweep: refused where MLflow refuses it, and kept for the sweep's life."""

import json
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands.doctor.machine_checks import CheckLevel
from orchestrator.commands.doctor.network_checks import network_checks
from orchestrator.errors import SpecError
from orchestrator.folders import SweepFolder
from orchestrator.tracking.mlflow_client import connect, tracking_uri
from orchestrator.tracking.tracking_store import (
    TRACKING_FILE,
    check_tracking_store,
    settle_tracking_uri,
    sweep_tracking_uri,
)

URI = "MLFLOW_TRACKING_URI"
SHIPPED = Path(__file__).parents[3] / "sweeps" / "quickstart.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(URI, raising=False)
    made = SweepFolder(tmp_path / "runs", "demo")
    made.path.mkdir(parents=True)
    return made


@pytest.mark.parametrize("store", ["file://{}/mlruns", "{}/mlruns", "./mlruns", "mlruns", "file:mlruns"])
def test_a_file_store_is_refused_by_plan_sweep_and_doctor_before_anything_is_written(
    store: str, folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = folder.root.parent
    monkeypatch.setenv("ORCHESTRATE_HOME", str(home / "new"))
    for given, env in ((["--set", f"tracking.uri={store.format(home)}"], {}), ([], {URI: store.format(home)})):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        for command in ("plan", "sweep"):
            assert cli.main([command, str(SHIPPED), *given]) == 2
            said = capsys.readouterr().err
            assert f"sqlite:///{home}/mlflow.db" in said
            assert f"mlflow migrate-filestore --source {home}/mlruns --target sqlite:///{home}/mlflow.db" in said
    (check,) = [check for check in network_checks(home, None) if check.what == "tracking"]
    assert check.level is CheckLevel.FAIL
    assert "sqlite:///" in check.fix
    assert not (home / "new").exists()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_tracking_store(store.format(home), None)


def test_mlflow_still_refuses_what_is_refused_here(folder: SweepFolder) -> None:
    store = f"file://{folder.root}/mlruns"
    with pytest.raises(Exception, match="maintenance mode"):
        connect(folder.root, store)
    with pytest.raises(SpecError, match="folder of files"):
        check_tracking_store(store, None)


def test_a_sweep_stays_with_the_store_where_it_began(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, "sqlite:///one.db")
    began = f"sqlite:///{folder.root.parent}/one.db"
    assert settle_tracking_uri(folder, None) == ""
    elsewhere = folder.root / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "stays with" in settle_tracking_uri(folder, None), "the relative name means another file here"
    assert sweep_tracking_uri(folder, None) == began
    monkeypatch.setenv(URI, "http://other:5000")
    message = settle_tracking_uri(folder, None)
    assert "http://other:5000" in message
    assert began in message
    monkeypatch.delenv(URI)
    assert settle_tracking_uri(folder, None) == ""
    assert sweep_tracking_uri(folder, None) == began
    assert settle_tracking_uri(folder, "http://chosen:5000") == "", "`--set` is said by itself"
    assert sweep_tracking_uri(folder, "http://chosen:5000") == "http://chosen:5000"


def test_a_sweep_of_the_runs_folders_own_store_moves_with_it(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_tracking_uri(folder, None)
    monkeypatch.setenv(URI, "http://other:5000")
    assert "stays with" in settle_tracking_uri(folder, None)
    moved = folder.root.rename(folder.root.parent / "moved")
    assert sweep_tracking_uri(SweepFolder(moved, "demo"), None) == f"sqlite:///{moved}/mlflow.db"
    assert tracking_uri(moved, None) == "http://other:5000", "of a new sweep"


def test_passwords_of_a_uri_are_used_and_not_stored(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, "https://me:hunter2@host/x")
    settle_tracking_uri(folder, None)
    stored = (folder.path / TRACKING_FILE).read_text()
    assert "hunter2" not in stored
    assert json.loads(stored)["uri"] == "https://host/x"
    assert settle_tracking_uri(folder, None) == ""
    assert sweep_tracking_uri(folder, None) == "https://me:hunter2@host/x"
