"""Make the README's pictures from the sweeps in the runs folder: `make pictures`. Needs Chromium on the PATH.

The first name is the sweep that is shown; all of them together are compared. Without names: the quickstarts.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dashboards.analysis.comparison import compare_sweeps
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.mlflow_pages import saved_view
from dashboards.report.comparison_page import comparison_page
from dashboards.report.html_page import write_page, write_report
from dashboards.terminal.trial_tables import print_final_summary, print_findings
from docs.chromium import Chromium, browser
from docs.mlflow_looks import CLOSE, open_charts, show, titles
from orchestrator.commands.status import status
from orchestrator.driver.data_stage import load_data_report, updates_by_params
from orchestrator.folders import SweepFolder, existing_sweep, known_sweeps, runs_folder
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.access_tokens import AccessTokens
from orchestrator.service.driver_supervisor import SERVICE_FOLDER
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_client import connect, ensure_experiment, tracking_uri
from orchestrator.tracking.mlflow_ui import start_ui, sweep_page
from orchestrator.tracking.run_metadata import run_page
from tests.support.page_service import serving

PICTURES = Path(__file__).parent / "pictures"
_LOOKS = (
    ("report-wide", 1280, 2600, False),
    ("report-dark", 1280, 2600, True),
    ("report-phone", 390, 1900, False),
)
_PAGES = (
    ("service-sweeps", "/", 1280, 1000, False),
    ("service-sweep", "/sweeps/{name}", 1280, 2400, False),
    ("service-sweep-dark", "/sweeps/{name}", 1280, 2400, True),
    ("service-sweep-phone", "/sweeps/{name}", 390, 1900, False),
    ("service-new", "/new", 1280, 1100, False),
)
"""Pictures of the service's pages: path, width, height, dark."""
_OTHERS = ("quickstart-dpo", "quickstart-orpo", "quickstart-cpo")
_DRAWN = "document.documentElement.dataset.drawn"
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
_WHOLE = "[...document.querySelectorAll('button')].find((b) => b.textContent === 'Show more')?.click()"
_DESCRIBED = "document.body.innerText.includes('Best trials by')"


def terminal(name: str, to: Path) -> None:
    """The end of a sweep as the terminal shows it."""
    folder = existing_sweep(runs_folder(), name)
    with Study.open(folder) as study:
        spec = study.spec
        views = [TrialCurves(record) for record in study.trials()]
        for view in views:
            view.add(study.metric_history(view.record.number))
        report = load_data_report(study.folder)
    steps = None if report is None else updates_by_params(spec, report)
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    print_final_summary(spec, views, console, updates_of=steps)
    print_findings(diagnose(load_sweep_frame(folder)), name, console)
    drawn = console.export_svg(title=f"orchestrate sweep sweeps/{name}.yaml")
    to.write_text(_FONT.sub("", drawn), encoding="utf-8")  # rich would fetch a font from the network


def mlflow(name: str, chromium: Chromium, folder: Path) -> None:
    """The sweep's page in MLflow, and its charts: all of them, on a screen that is tall enough."""
    with Study.open(existing_sweep(runs_folder(), name)) as study:
        spec, sweep_id = study.spec, study.id
    uri = tracking_uri(runs_folder(), spec.tracking.uri)
    ui = start_ui(runs_folder(), uri)
    try:
        page = chromium.page()
        view = saved_view(spec, sweep_id, time.time())
        address = sweep_page(ui.base, runs_folder(), uri, spec.tracking.experiment, sweep_id, view)
        open_charts(page, address, height=1700)
        for title in titles(page):
            assert show(page, title) == "drawn", title
        show(page, titles(page)[0])
        time.sleep(3)  # the last lines glide into their places
        page.picture(folder / "mlflow-charts.png", whole=False)
        start = chromium.page()
        start.look(ui.base + _run_page(uri, spec.tracking.experiment, name), width=1800, height=1250, ready=_DESCRIBED)
        start.run(CLOSE)
        start.run(_WHOLE)
        time.sleep(3)
        start.picture(folder / "mlflow.png", whole=False)
    finally:
        ui.stop()


def _run_page(uri: str, experiment: str, name: str) -> str:
    """Where MLflow shows the parent run."""
    number = ensure_experiment(connect(runs_folder(), uri), runs_folder(), uri, experiment)
    return f"/#{run_page(number, status(name, runs_folder())['run_id'])}"


def page_pictures(file: Path, looks: Sequence[tuple[str, int, int, bool]], chromium: Chromium) -> None:
    """The beginning of a page. `looks`: picture, width, height, dark."""
    for picture, width, height, dark in looks:
        page = chromium.page()
        page.look(file.as_uri(), width=width, height=height, dark=dark, ready=_DRAWN)
        page.picture(PICTURES / f"{picture}.png", whole=False)


def service(name: str, chromium: Chromium) -> None:
    """The service's pages over this runs folder, of which no sweep is started."""
    token = AccessTokens(runs_folder() / SERVICE_FOLDER).machine_token()
    with serving(runs_folder(), ()) as served:
        page = chromium.page()
        page.look(f"{served.base}/login", width=1280)
        page.run(f"document.getElementById('token').value = {token!r}")
        page.run("document.querySelector('form').requestSubmit()")
        page.look(f"{served.base}/", width=1280, ready="!document.getElementById('token')")
        for picture, path, width, height, dark in _PAGES:
            ready = {"/": "true", "/new": "document.documentElement.dataset.checked"}.get(path, _DRAWN)
            page.look(served.base + path.format(name=name), width=width, height=height, dark=dark, ready=ready)
            page.picture(PICTURES / f"{picture}.png", whole=False)


def main() -> None:
    """Make every picture of the README and the documents."""
    names = sys.argv[1:] or ["quickstart", *sorted(n for n in known_sweeps(runs_folder()) if n in _OTHERS)]
    folders: list[SweepFolder] = [existing_sweep(runs_folder(), name) for name in names]
    PICTURES.mkdir(exist_ok=True)
    terminal(names[0], PICTURES / "terminal.svg")
    with browser() as chromium, tempfile.TemporaryDirectory() as place:
        report = write_report(analyze(load_sweep_frame(folders[0])), Path(place) / "report.html")
        page_pictures(report, _LOOKS, chromium)
        if len(folders) > 1:
            file = Path(place) / "compare.html"
            write_page(file, comparison_page(compare_sweeps([load_sweep_frame(folder) for folder in folders])))
            page_pictures(file, [("compare", 1280, 1900, False)], chromium)
        mlflow(names[0], chromium, PICTURES)
        service(names[0], chromium)
    print(f"pictures of {', '.join(names)} in {PICTURES}")


if __name__ == "__main__":
    main()
