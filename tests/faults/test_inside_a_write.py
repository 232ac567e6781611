"""Case 2: killed inside a state write, everything is as before it or as after it, and a resume finishes exactly."""

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from orchestrator.study.database import study_database
from orchestrator.tracking import mlflow_client
from orchestrator.tracking.mlflow_client import connect
from tests.support.local_driver import KILLED, drive, forked, killed_at
from tests.support.mlflow_server import make_database
from tests.support.sweep_record import count_points, differences, doubled_rows, sweep_record

IN_ORDER = """
sweep.folder:1 sweep.made:1 study.tables:1 study.begun:2 outbox.append:2 folder.sync:1 checkpoint.weights:1
checkpoint.manifest:1 outbox.deliver:1 study.commit:5 outbox.appended:3 outbox.delivered:1 folder.rename:1
folder.renamed:1 study.committed:4 checkpoint.discarded:1 outbox.advanced:1 file.rename:1 file.renamed:1
trial.told:1 trial.closed:1 retention.remove:1
"""
POINTS = {name: int(nth) for name, nth in (word.split(":") for word in IN_ORDER.split())}
"""Each point, in the order in which one sweep comes to it, and a pass."""


@pytest.fixture(scope="module")
def store_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's empty database: making its tables takes seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    assert forked(lambda: connect(root, f"sqlite:///{root / 'mlflow.db'}")) == 0
    return root / "mlflow.db"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, store_made: Path) -> Path:
    """The sweep that nobody touched."""
    root = tmp_path_factory.mktemp("calm")
    shutil.copy(store_made, root)
    assert forked(lambda: drive(root)) == 0
    return root


@pytest.fixture
def fresh(fast_tmp_path: Path, store_made: Path) -> Callable[[int], Path]:
    """A new runs folder for each death."""

    def make(nth: int) -> Path:
        root = fast_tmp_path / str(nth)
        root.mkdir()
        shutil.copy(store_made, root)
        return root

    return make


def assert_same(calm: Path, root: Path) -> None:
    left, right = sweep_record(calm, "s"), sweep_record(root, "s")
    assert differences(left, right) == []
    assert doubled_rows(right) == 0
    assert count_points(right) == 21


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_at_every_pass_of_a_failpoint(calm: Path, fresh: Callable[[int], Path], point: str) -> None:
    """One sweep after the other until a point is no longer reached that often."""
    for nth in range(1, 200):
        root = fresh(nth)
        code = killed_at(partial(drive, root), f"{point}:{nth}")
        if code == 0:
            assert nth > 1, "the point was never reached"
            return
        assert code == KILLED
        assert forked(partial(drive, root)) == 0
        assert_same(calm, root)
        shutil.rmtree(root)


def test_again_and_again_at_every_point(calm: Path, fresh: Callable[[int], Path]) -> None:
    """One sweep that dies at every point in turn."""
    deaths, root = 0, fresh(0)
    for point, nth in POINTS.items():
        deaths += killed_at(partial(drive, root), f"{point}:{nth}") == KILLED
    assert forked(lambda: drive(root)) == 0
    assert deaths > len(POINTS) // 2
    assert_same(calm, root)


def test_while_mlflows_store_is_made(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own migrations do not survive it: they are made aside and renamed."""
    monkeypatch.setattr(mlflow_client, "create_mlflow_database", make_database)
    uri = f"sqlite:///{fast_tmp_path / 'mlflow.db'}"

    def die(after: float | None) -> None:
        if after is None:
            os.environ["ORCHESTRATE_FAILPOINT"] = "mlflow.made"
        else:
            signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_PROF, after)  # of its own CPU time, however busy the machine is
        connect(fast_tmp_path, uri)

    for after in (0.3, None):
        code = forked(partial(die, after))
        assert code == KILLED or (fast_tmp_path / "mlflow.db").exists()
    assert forked(lambda: connect(fast_tmp_path, uri)) == 0
    assert not list(fast_tmp_path.glob(".mlflow.db.*.tmp*"))


def deadly_connect(die_at: int) -> Callable[[Path], object]:
    """Connections that kill the process at the n-th statement that SQLite is given, whatever it is."""
    import itertools

    plain, count = study_database._connect, itertools.count(1)

    def deadly(database: Path) -> object:
        connection = plain(database)

        def seen(_: str) -> None:
            if next(count) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        connection.set_trace_callback(seen)
        return connection

    return deadly


def statement(root: Path, nth: int) -> int:
    def die() -> None:
        study_database._connect = deadly_connect(nth)  # pyright: ignore[reportAttributeAccessIssue]
        drive(root)

    return forked(die)


def test_while_the_study_is_made_and_used(calm: Path, fresh: Callable[[int], Path]) -> None:
    """At some of the statements that the database is given, the making of its tables among them."""
    for nth in (20, 400):
        root = fresh(nth)
        assert statement(root, nth) == KILLED
        assert forked(lambda root=root: drive(root)) == 0
        assert_same(calm, root)


@pytest.mark.faults
def test_at_every_statement_of_the_making_and_every_seventh_after(calm: Path, fresh: Callable[[int], Path]) -> None:
    nth = 0
    while True:
        nth += 1 if nth < 110 else 7
        root = fresh(nth)
        code = statement(root, nth)
        if code == 0:
            break
        assert code == KILLED
        assert forked(lambda root=root: drive(root)) == 0
        assert_same(calm, root)
        shutil.rmtree(root)
    assert nth > 300
