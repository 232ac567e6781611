"""Where the pages of a sweep are: on somebody else's server, and inside MLflow's own (running ones: tests/faults)."""

import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import StorageRefused
from orchestrator.tracking import mlflow_ui
from orchestrator.tracking.mlflow_ui import PortInUse, start_ui
from orchestrator.tracking.run_metadata import charts_page
from orchestrator.tracking.tied_process import tied_command
from tests.support.processes import wait_until


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_tracking_server_shows_its_own_page(tmp_path: Path) -> None:
    ui = start_ui(tmp_path, "https://me:secret@tracking.example.org/")
    assert (ui.base, ui.process) == ("https://tracking.example.org", None)


def test_the_page_of_another_program_is_not_taken_for_ours(tmp_path: Path, taken: int) -> None:
    with pytest.raises(PortInUse, match=rf"port {taken} is used by another program: --port OTHER, or --port 0"):
        start_ui(tmp_path / "runs", "sqlite:///x.db", port=taken)
    assert not (tmp_path / "runs").exists()


def test_a_free_port_that_somebody_took_first_is_replaced(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = iter([taken, mlflow_ui._free_port("127.0.0.1"), taken])
    monkeypatch.setattr(mlflow_ui, "_free_port", lambda _: next(ports))
    monkeypatch.setattr(mlflow_ui, "connect", lambda *_: None)
    monkeypatch.setattr(sys, "executable", "false")  # a server that ends at once
    with pytest.raises(StorageRefused, match="did not start"):
        start_ui(tmp_path, "sqlite:///x.db")
    assert list(ports) == [taken], "one that ended for another reason is not started again"


def test_the_address_of_a_sweeps_charts() -> None:
    page, requested = charts_page("3", "my-sweep").split("?")
    assert page == "/experiments/3/runs"
    expected = dict(urllib.parse.parse_qsl(requested))
    # Search words in the address would keep MLflow from loading the view: they are inside it.
    assert expected == {
        "viewStateShareKey": "prefsweep-my-sweep",
        "compareRunsMode": "CHART",
        "workflowType": "machine_learning",
    }


TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
from orchestrator.tracking.tied_process import tied_command
process = subprocess.Popen(tied_command(60, [sys.executable, "-c", {TREE!r}]), stdin=subprocess.PIPE)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM])
def test_a_tied_server_and_its_workers_end_with_the_program_that_started_it(ends: signal.Signals) -> None:
    program = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    tied, worker = int(program.stdout.readline()), int(program.stdout.readline())
    tree = [psutil.Process(tied), *psutil.Process(tied).children(recursive=True)]
    assert worker in [process.pid for process in tree]
    program.send_signal(ends)
    program.wait()
    wait_until(lambda: not [process for process in tree if process.is_running() and process.status() != "zombie"])


def test_a_tied_server_ignores_the_terminals_signals_and_answers_with_its_exit_code() -> None:
    tied = subprocess.Popen(
        tied_command(60, ["/bin/sh", "-c", "read line < /dev/stdin; echo started; exec sleep 600"]),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tied.stdin is not None
    assert tied.stdout is not None
    assert tied.stdout.readline() == "started\n", "its own input is empty"
    tied.send_signal(signal.SIGINT)
    tied.send_signal(signal.SIGHUP)
    assert tied.poll() is None
    tied.stdin.close()
    assert tied.wait() == -signal.SIGTERM % 256
    with subprocess.Popen(tied_command(60, ["/bin/sh", "-c", "exit 7"]), stdin=subprocess.PIPE) as other:
        assert other.wait() == 7
