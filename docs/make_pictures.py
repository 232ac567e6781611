"""Make the README's pictures from the quickstart in the runs folder: `make pictures`. Needs Chromium on the PATH."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from dashboards.frame import TrialView
from dashboards.terminal import summary
from orchestrator.driving.stages import load_report, steps_by_params
from orchestrator.folders import existing, home
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow import tracking_uri
from orchestrator.tracking.ui import experiment_id, runs_url, start_ui

PICTURES = Path(__file__).parent / "pictures"
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


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


def screenshot(url: str, to: Path, *, width: int = 2000, height: int = 1100) -> None:
    """A page in a real Chromium, once its scripts have had time to draw it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium on the PATH")
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += ["--virtual-time-budget=30000", "--timeout=60000", f"--screenshot={to}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=180)


def mlflow(name: str, to: Path) -> None:
    """The sweep's runs in the MLflow UI."""
    with Study.open(existing(home(), name)) as study:
        spec = study.spec
    uri = tracking_uri(home(), spec.tracking.uri)
    ui = start_ui(home(), uri)
    try:
        experiment = experiment_id(home(), uri, spec.tracking.experiment)
        screenshot(f"{runs_url(ui.base, experiment, name, spec.goal)}&compareRunsMode=CHART", to)
    finally:
        ui.stop()


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    PICTURES.mkdir(exist_ok=True)
    terminal(name, PICTURES / "terminal.svg")
    mlflow(name, PICTURES / "mlflow.png")
    print(f"pictures of {name} in {PICTURES}")


if __name__ == "__main__":
    main()
