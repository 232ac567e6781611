"""Where the pages of a sweep are: on somebody else's server, and inside MLflow's own (running ones: tests/faults)."""

import urllib.parse
from pathlib import Path

from orchestrator.tracking.mlflow_ui import start_ui
from orchestrator.tracking.run_metadata import charts_page


def test_a_tracking_server_shows_its_own_page(tmp_path: Path) -> None:
    ui = start_ui(tmp_path, "https://me:secret@tracking.example.org/")
    assert (ui.base, ui.process) == ("https://tracking.example.org", None)


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
