"""`delete`: the sweep, its study and its MLflow runs, each gone or not; killed in between, the next call ends it."""

import io
import sqlite3
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.driver.parent_run import open_sink
from orchestrator.folders import SweepFolder, known_sweeps, sweep_lock
from orchestrator.interfaces import SweepReporter
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from tests.support.local_driver import KILLED, forked, killed_at
from tests.support.processes import call, called
from tests.support.scripted_sweep import Script, make_spec, run_sweep

RATES = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}


class _Reporter:
    def charts_view(self, *_: object) -> tuple[str, str]:
        return "view", "{}"


def tracked_sweep(root: Path, name: str, **more: object) -> SweepFolder:
    """A finished sweep with two runs in MLflow, each with a file."""
    folder = run_sweep(root, make_spec(name, RATES, **more), lambda _: Script())
    reporter: SweepReporter = _Reporter()  # pyright: ignore[reportAssignmentType]
    with Study.open(folder) as study:
        sink = open_sink(study, root, reporter)
        for run in ("sweep", "0"):
            sink.start_run(run, name=f"{name} {run}", params={}, tags={}, at=1.0)
            sink.log_artifact(run, folder.spec)
            sink.end_run(run, status="FINISHED", tags={}, at=2.0)
        assert sink.close(60.0) == 0
    return folder


def runs_of(root: Path) -> list[str]:
    with sqlite3.connect(root / "mlflow.db") as store:
        return sorted(name for (name,) in store.execute("select name from runs"))


def artifact_files(root: Path) -> int:
    return sum(path.is_file() for path in (root / "artifacts").rglob("*"))


def test_delete_says_what_it_frees_and_removes_folder_log_and_runs(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tracked_sweep(home, "a")
    tracked_sweep(home, "b")
    reader = run_sweep(home, make_spec("reader", RATES), lambda _: Script(files=False), trials=1)
    spec = make_spec("reader", RATES, base={"model": {"name_or_path": f"{folder.path}/trials/0000/1/model"}})
    reader.spec.write_text(dump_spec(spec), encoding="utf-8")
    folder.log.parent.mkdir()
    folder.log.write_text("words", encoding="utf-8")
    files = artifact_files(home)
    assert main(["delete", "a"]) == 2  # no terminal to ask on
    asked = capsys.readouterr().err
    assert "add --yes" in asked
    assert "2 trials done" in asked
    assert "2 runs in MLflow" in asked
    assert "reader reads files of it (base.model.name_or_path)" in asked
    assert known_sweeps(home) == ["a", "b", "reader"]
    assert main(["delete", "a", "--yes"]) == 0
    assert known_sweeps(home) == ["b", "reader"]
    assert runs_of(home) == ["b 0", "b sweep"]
    assert artifact_files(home) == files // 2
    assert not folder.log.exists()
    assert [path.name for path in home.glob(".deleted")] == []
    assert main(["delete", "bb", "--yes"]) == 2
    assert "did you mean 'b'?" in capsys.readouterr().err
    assert main(["delete", "b", "--yes", "--keep-mlflow"]) == 0
    assert runs_of(home) == ["b 0", "b sweep"]


def test_a_sweep_stays_after_a_no(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(home, make_spec("a", RATES), lambda _: Script(files=False))
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(["delete", "a"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("nothing was changed\n")
    assert "interrupted" not in said
    assert known_sweeps(home) == ["a"]


def test_a_running_sweep_is_not_deleted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_sweep(home, make_spec("a", RATES), lambda _: Script(files=False))
    with sweep_lock(folder):
        assert main(["delete", "a", "--yes"]) == 4
    assert "`orchestrate stop a` stops it" in capsys.readouterr().err
    assert folder.spec.is_file()


def test_a_damaged_study_does_not_keep_a_sweep_from_being_deleted(home: Path) -> None:
    folder = run_sweep(home, make_spec("a", RATES), lambda _: Script(files=False))
    folder.database.write_bytes(b"no database")
    folder.spec.write_text("{", encoding="utf-8")
    assert main(["delete", "a", "--yes"]) == 0
    assert known_sweeps(home) == []


def test_the_study_in_another_database_is_deleted_and_its_neighbours_stay(home: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    for name in ("a", "b"):
        folder = SweepFolder(home, name)
        with Study.create(folder, make_spec(name, RATES), url) as study:
            folder.spec.write_text(dump_spec(study.spec), encoding="utf-8")
            assert study.ask() is not None
    assert main(["delete", "a", "--yes"]) == 0
    with Study.open(SweepFolder(home, "b")) as study:
        assert len(study.trials()) == 1
    with Study.create(SweepFolder(home, "a"), make_spec("a", RATES), url) as again:  # the name is free there too
        assert again.trials() == []


@pytest.mark.parametrize(
    "point",
    ["delete.listed", "delete.moved", "mlflow.run-deleted:2", "delete.runs", "delete.study", "delete.files:2"],
)
def test_a_deletion_that_was_killed_is_finished_by_the_next_one(point: str, home: Path) -> None:
    assert forked(lambda: tracked_sweep(home, "a")) == 0  # no connection of this process is inherited
    assert killed_at(lambda: call(home, "delete", "a", "--yes"), point) == KILLED
    assert (home / "a").exists() == (point == "delete.listed")
    called(home, "delete", "a", "--yes")
    assert (runs_of(home), artifact_files(home)) == ([], 0)
    assert sorted(path.name for path in home.iterdir()) == ["artifacts", "mlflow.db"]
