"""Make the README's pictures from the quickstart in the runs folder: `make pictures`. Needs Chromium on the PATH."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from dashboards.frame import TrialView
from dashboards.insight import insight
from dashboards.mlflow_pages.view import saved_view
from dashboards.page import write_report
from dashboards.terminal import summary
from docs.chromium import browser
from orchestrator.commands.reporting import frame_of
from orchestrator.driving.stages import load_report, steps_by_params
from orchestrator.folders import existing, home
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow import tracking_uri
from orchestrator.tracking.names import trials_filter
from orchestrator.tracking.ui import start_ui, sweep_page

PICTURES = Path(__file__).parent / "pictures"
_DRAWN = "document.querySelectorAll('.js-plotly-plot').length >= 5"
_CLOSE = "[...document.querySelectorAll('button[aria-label=Close]')].forEach(b => b.click())"
"""MLflow opens its assistant beside every page of a new profile."""


def terminal(name: str, to: Path) -> None:
    """The end of a sweep as the terminal shows it."""
    with Study.open(existing(home(), name)) as study:
        views = [TrialView(record) for record in study.trials()]
        for view in views:
            view.add(study.points(view.record.number))
        report = load_report(study.folder)
        steps = None if report is None else steps_by_params(study.spec, report)
        console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
        summary(study.spec, views, console, steps=steps)
    console.save_svg(str(to), title=f"orchestrate sweep sweeps/{name}.yaml")


def mlflow(name: str, to: Path) -> None:
    """The sweep's charts in the MLflow UI."""
    with Study.open(existing(home(), name)) as study:
        spec = study.spec
    uri = tracking_uri(home(), spec.tracking.uri)
    ui = start_ui(home(), uri)
    try:
        view = saved_view(spec, trials_filter(name), time.time())
        with browser() as chromium:
            page = chromium.page()
            address = sweep_page(ui.base, home(), uri, spec.tracking.experiment, name, view)
            page.look(address, width=1800, height=1250, ready=_DRAWN)
            time.sleep(3)
            page.run(_CLOSE)
            time.sleep(3)  # the charts take the room
            page.picture(to, whole=False)
    finally:
        ui.stop()


def report(name: str, folder: Path) -> None:
    """The beginning of the report on a desk, in the dark, and on a phone."""
    with tempfile.TemporaryDirectory() as place, browser() as chromium:
        file = write_report(insight(frame_of(existing(home(), name))), Path(place) / "report.html")
        for look, width, height, dark in (
            ("wide", 1280, 1900, False),
            ("dark", 1280, 1900, True),
            ("phone", 390, 1900, False),
        ):
            page = chromium.page()
            drawn = "document.documentElement.dataset.drawn"
            page.look(file.as_uri(), width=width, height=height, dark=dark, ready=drawn)
            page.picture(folder / f"report-{look}.png", whole=False)


def main() -> None:
    """Make every picture of the README and the documents."""
    name = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    PICTURES.mkdir(exist_ok=True)
    terminal(name, PICTURES / "terminal.svg")
    mlflow(name, PICTURES / "mlflow.png")
    report(name, PICTURES)
    print(f"pictures of {name} in {PICTURES}")


if __name__ == "__main__":
    main()
