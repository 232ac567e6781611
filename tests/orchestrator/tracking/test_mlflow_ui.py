"""Where the pages of a sweep are: on somebody else's server, and inside MLflow's own (running ones: tests/faults)."""

import socket
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import StorageRefused
from orchestrator.tracking import mlflow_ui
from orchestrator.tracking.mlflow_ui import PortInUse, start_ui
from orchestrator.tracking.run_metadata import charts_page


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
