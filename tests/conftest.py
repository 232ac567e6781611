"""What every test starts from: helpers that child processes find too, and long files first (`make pytest`)."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import orchestrator.execution  # noqa: F401  sets what Ray reads when a test's module imports it
from tests.support import IN_MEMORY

hypothesis.settings.register_profile("tests", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("tests")

HERE = Path(__file__).parent
# Processes that tests start, Ray's workers too, import this checkout and `tests.support`.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
# As in a terminal: what tests start would ignore what was ignored here, as SIGHUP is under nohup and SIGINT behind `&`.
for _signum, _handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _handler)
_LONG = ("docs", "end_to_end", "orchestrator/execution", "faults", "orchestrator/driver", "trainer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole and in their order; only folders move, those that take long first (`--no-loadscope-reorder`).

    So two processes end together: what is left at the end are files of seconds.
    """

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(HERE).as_posix() if item.path.is_relative_to(HERE) else ""
        return next((n for n, folder in enumerate(_LONG) if path.startswith(f"{folder}/")), len(_LONG))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def quick_mlflow_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """New MLflow databases of this process, and of its forks, are copies of one: their tables cost a second each."""
    from orchestrator.tracking import mlflow_client
    from tests.support.mlflow_server import copied_databases

    with pytest.MonkeyPatch.context() as patch:
        template = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
        patch.setattr(mlflow_client, "create_mlflow_database", copied_databases(template))
        yield


@pytest.fixture(scope="session", autouse=True)
def optunas_migrations_are_read_once() -> Iterator[None]:
    """In this process, and not twice for every new study: that takes half a second. What is written is the same."""
    from optuna.storages._rdb.storage import _VersionManager

    read, scripts = _VersionManager._create_alembic_script, list[Any]()

    def read_once(manager: _VersionManager) -> Any:
        if not scripts:
            scripts.append(read(manager))
        return scripts[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionManager, "_create_alembic_script", read_once)
        yield


@pytest.fixture(autouse=True)
def end_heartbeats() -> Iterator[None]:
    """End the heartbeats of studies that a test did not dispose, which Ray may hold until its next run.

    Some tests fork this process. A heartbeat inside SQLite at that moment would leave its lock taken in the child.
    """
    yield
    for thread in threading.enumerate():
        if thread.name == "heartbeat" and (run := getattr(thread, "_target", None)) is not None:
            run.__self__.end()


@pytest.fixture
def fast_tmp_path() -> Iterator[Path]:
    """A folder in memory where the system has that, with a path short enough for Ray's sockets.

    Databases and outboxes wait for the disk at every step; what these tests kill is a process, not the disk.
    """
    with tempfile.TemporaryDirectory(dir=IN_MEMORY, ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs folder of commands that a test calls, which is not there yet; the hub and MLflow's are not elsewhere."""
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    """A bucket of a server that speaks S3's protocol, on a free port of this machine."""
    from tests.support.s3_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def service_root(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runs folder of a machine without GPUs, whose processes end with the test."""
    from tests.support.processes import environment
    from tests.support.service_process import end_processes

    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    yield fast_tmp_path
    end_processes(fast_tmp_path)


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for a module's tests, with the module's CLUSTER_SLOTS: starting it costs seconds."""
    from orchestrator.execution.local_cluster import local_cluster  # Ray takes seconds to load
    from orchestrator.execution.stop_reasons import SignalHandler
    from tests.support.fake_session import SLOTS

    slots = getattr(request.module, "CLUSTER_SLOTS", SLOTS)
    with SignalHandler(lambda: "") as signals, local_cluster(tmp_path_factory.mktemp("ray"), slots, signals):
        yield
