"""Make the README's pictures from the sweeps in the runs folder: `make pictures`. Needs Chromium on the PATH.

The first name is the sweep that is shown; all of them together are compared. Without names: the quickstarts.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from PIL import Image
from rich.console import Console

from dashboards.analysis.comparison import compare_sweeps
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.mlflow_pages import saved_view
from dashboards.report.comparison_page import comparison_page
from dashboards.report.html_page import write_page, write_report
from dashboards.terminal.trial_tables import print_final_summary, print_findings
from docs.chromium import PAINTED, Chromium, Page, browser
from docs.mlflow_looks import CLOSE, open_charts, show, titles
from orchestrator.commands.status import status
from orchestrator.driver.data_stage import load_data_report, updates_by_params
from orchestrator.folders import SweepFolder, existing_sweep, known_sweeps, runs_folder
from orchestrator.report_data import load_sweep_frame
from orchestrator.service.access_tokens import AccessTokens, Role
from orchestrator.service.driver_supervisor import SERVICE_FOLDER
from orchestrator.service.hosting.queue_location import queue_url
from orchestrator.service.sweep_queue import SweepQueue
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import ISSUED, Outcome, Trial, TrialState
from orchestrator.tracking.mlflow_client import connect, ensure_experiment, tracking_uri
from orchestrator.tracking.mlflow_ui import start_ui, sweep_page
from orchestrator.tracking.run_metadata import run_page
from tests.support.page_service import driving, serving
from tests.support.processes import wait_until

PICTURES = Path(__file__).parent / "pictures"
SWEEPS = Path(__file__).parents[1] / "sweeps"
_LOOKS = (
    ("report-wide", 1280, 2600, False),
    ("report-dark", 1280, 2600, True),
    ("report-phone", 390, 1900, False),
)
_PAGES = (
    ("service-sweeps", "/", 1280, 800, False),
    ("service-sweep", "/sweeps/{live}", 1280, 2000, False),
    ("service-curves", "/sweeps/{live}?select=3&select=7#curves", 1280, 760, True),
    ("service-sweep-phone", "/sweeps/{live}", 390, 1900, False),
    ("service-trial", "/sweeps/{name}/trials/{other}", 1280, 1500, False),
    ("service-new", "/new?example={name}", 1280, 980, False),
    ("service-compare", "/compare?{names}", 1280, 1500, True),
)
"""Pictures of the service's pages: path, width, height, dark."""
_LIVE = "simpo-again"
"""The sweep that runs in them: the first one's trials, as far as they were at `_MOMENT` of its time."""
_MOMENT = 0.9
_OTHERS = ("quickstart-dpo", "quickstart-orpo", "quickstart-cpo")
_DRAWN, _CHECKED = "document.documentElement.dataset.drawn", "document.documentElement.dataset.checked"
_DIAGNOSED = """[...document.querySelectorAll('.listed tbody tr')].every((row) =>
  row.lastElementChild.textContent !== '–' || row.querySelector('.state').textContent === 'waiting')"""
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
        _picture(page, PICTURES / f"{picture}.png")


@contextmanager
def _running(root: Path, source: SweepFolder) -> Generator[None]:
    """A sweep whose driver is this process, with what another one's trials had reported at a moment of its time."""
    with Study.open(source, read_only=True) as study:
        spec, events = study.spec, study.events()
        records = {record.number: record for record in study.trials()}
        histories = {number: study.metric_history(number) for number in records}
    begun = {event.trial: event.at for event in events if event.kind == ISSUED}
    ended = {event.trial: event.at for event in events if event.kind in [state.lower() for state in TrialState]}
    first, last = min(begun.values()), max(ended.values())
    moment, folder = first + _MOMENT * (last - first), SweepFolder(root, _LIVE)
    steps = [(at, 0, number) for number, at in begun.items()] + [(at, 1, number) for number, at in ended.items()]
    shift = time.time() - moment
    shutil.copytree(source.path, folder.path, ignore=lambda _, names: {"study.db", "trials"} & set(names))
    trials: dict[int, Trial] = {}
    with ExitStack() as stack:
        with patch("time.time", lambda: first - 30 + shift):
            study = stack.enter_context(driving(root, spec.model_copy(update={"name": _LIVE})))
        for at, is_end, number in sorted(step for step in steps if step[0] <= moment):
            with patch("time.time", lambda at=at: at + shift):
                if not is_end:
                    trial = study.ask()
                    assert isinstance(trial, Trial)
                    assert trial.params == records[number].params
                    trials[number] = trial
                else:
                    study.report(trials[number], histories[number])
                    study.tell(trials[number], Outcome(records[number].state, records[number].reason))
                    shutil.copytree(source.trial(number), folder.trial(number))
        for number in trials.keys() - {number for number, at in ended.items() if at <= moment}:
            share = (moment - begun[number]) / (ended[number] - begun[number])
            study.report(trials[number], histories[number][: round(share * len(histories[number]))])
        yield


def service(folders: Sequence[SweepFolder], chromium: Chromium) -> None:
    """The service's pages over copies of these sweeps, one that runs, and two that wait; none is started."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for folder in folders:
            shutil.copytree(folder.path, root / folder.name)
        with ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, ORCHESTRATE_HOME=place))
            stack.enter_context(_running(root, folders[0]))
            queue = SweepQueue(queue_url(root))
            stack.callback(queue.close)
            queue.adopt(_LIVE, owner="ann", gpus=0)
            queue.begin_launch(_LIVE, "")
            for name, owner, priority in (("llama3-8b-orpo", "ben", 0), ("mistral-7b-base", "ann", 2)):
                spec = load_spec(SWEEPS / f"{name}.yaml")
                queue.submit(name, dump_spec(spec), root / name, owner=owner, priority=priority, gpus=4)
            ann = {Role.ADMIN: AccessTokens(root / SERVICE_FOLDER).create("ann", Role.OPERATOR)}
            served = replace(stack.enter_context(serving(root, ())), tokens=ann)
            page = chromium.page()
            served.log_in(page)
            wait_until(lambda: page.look(f"{served.base}/", width=1280) or page.run(_DIAGNOSED))
            names = "&".join(f"name={folder.name}" for folder in folders[:4])
            for picture, path, width, height, dark in _PAGES:
                ready = {"/": "true", "/new": _CHECKED}.get(path.partition("?")[0], _DRAWN)
                shown = path.format(live=_LIVE, name=folders[0].name, other=0, names=names)
                address, _, section = shown.partition("#")
                page.look(served.base + address, width=width, height=height, dark=dark, ready=ready)
                if section:
                    page.run(f"document.getElementById({section!r}).scrollIntoView({{ behavior: 'instant' }})")
                    page.run(PAINTED)
                _picture(page, PICTURES / f"{picture}.png")
            page.close()


def _picture(page: Page, to: Path) -> None:
    """What is seen without scrolling, in 128 colors, which keeps the file small."""
    page.picture(to, whole=False)
    with Image.open(to) as shot:
        shot.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(to, optimize=True)


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
        service(folders, chromium)
    print(f"pictures of {', '.join(names)} in {PICTURES}")


if __name__ == "__main__":
    main()
