"""Composition root: passes progress view and reporter to the driver, and prints the final summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from dashboards.analysis.load_frame import load_frame
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.diagnose import diagnose
from dashboards.formatting import wide_console
from dashboards.mlflow_pages import saved_view
from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.progress_views import open_view
from dashboards.terminal.trial_tables import print_final_summary, print_findings
from orchestrator import folders
from orchestrator.commands.status import sweep_state
from orchestrator.driver import orphaned_runs, run_sweep
from orchestrator.driver.data_stage import known_steps
from orchestrator.errors import ExitCode
from orchestrator.execution.remote_cluster import ClusterAddress
from orchestrator.execution.stop_reasons import SignalHandler, StopKind, StopReason
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.interfaces import Presentation
from orchestrator.spec.estimates.sweep_plan import total_trials
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.sweep_spec import SweepSpec, Tracking
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.mlflow_ui import start_ui, sweep_page

_WATCH_SECONDS = 1.0
"""Seconds between two reads of the study by `status --watch`."""
_REFRESHES_PER_READ = 4
"""Refreshes of the view between two reads, for changes that it has not drawn yet."""


def presentation() -> Presentation:
    """Return the terminal's progress view and the dashboards' reporter."""
    return Presentation(
        open_view=lambda spec, total: open_view(spec, Console(stderr=True), total=total),
        reporter=DashboardReporter(),
    )


def start(
    spec: SweepSpec, root: Path, *, cluster_at: ClusterAddress | None = None, trust_remote_code: bool = False
) -> ExitCode:
    """Run a new sweep and print its summary; raises like `orchestrator.driver.run_sweep.start`."""
    ended = run_sweep.start(spec, root, presentation(), cluster_at=cluster_at, trust_remote_code=trust_remote_code)
    return print_summary(SweepFolder(root, spec.name), spec, ended)


def start_or_resume(
    spec: SweepSpec, root: Path, *, cluster_at: ClusterAddress | None = None, trust_remote_code: bool = False
) -> ExitCode:
    """Start this sweep, or resume it if it exists, and print its summary."""
    ended = run_sweep.start_or_resume(
        spec, root, presentation(), cluster_at=cluster_at, trust_remote_code=trust_remote_code
    )
    return print_summary(SweepFolder(root, spec.name), spec, ended)


def resume(
    name: str,
    root: Path,
    overrides: Sequence[str] = (),
    *,
    mirror: str | None = None,
    cluster_at: ClusterAddress | None = None,
    trust_remote_code: bool = False,
) -> ExitCode:
    """Resume a sweep and print its summary; raises like `orchestrator.driver.run_sweep.resume`."""
    ended = run_sweep.resume(
        name,
        root,
        presentation(),
        overrides,
        mirror=mirror,
        cluster_at=cluster_at,
        trust_remote_code=trust_remote_code,
    )
    folder = existing_sweep(root, name)
    return print_summary(folder, load_spec(folder.spec, is_new=False), ended)


def watch_sweep(name: str, root: Path) -> None:
    """Show the progress of a sweep that another process runs, until its end or Ctrl-C; then print the summary."""
    folder = existing_sweep(root, name)
    while not Study.exists(folder) and folders.lock_holder(folder):
        time.sleep(_WATCH_SECONDS)
    with Study.open(folder, read_only=True) as study:
        spec, steps = study.spec, known_steps(folder, study.spec)
        console = Console(stderr=True)
        before = study.usage().hours * 3600
        view = open_view(spec, console, total=total_trials(spec), steps=steps, before=before)
        seen: dict[int, tuple[TrialState, int, int]] = {}
        try:
            while True:
                has_driver = folders.lock_holder(folder) is not None
                for record in study.trials():
                    current = (record.state, record.attempts, record.step)
                    previous = seen.get(record.number)
                    if previous is None or previous[:2] != current[:2]:
                        view.update_trial(record)
                    if previous is None or previous[2] != record.step:
                        view.add_metrics(record.number, study.metric_history(record.number))
                    seen[record.number] = current
                view.refresh()
                if not has_driver:
                    break
                for _ in range(_REFRESHES_PER_READ):
                    time.sleep(_WATCH_SECONDS / _REFRESHES_PER_READ)
                    view.refresh()
        finally:
            view.close()
        views = [TrialCurves(record) for record in study.trials()]
        for trial in views:
            trial.add(study.metric_history(trial.record.number))
        print_final_summary(spec, views, wide_console(), steps=steps)
        if sweep_state(study) == "interrupted":
            reason = study.stop_reason()
            console.print(f"{name} is interrupted{f': {reason}' if reason else ''}. Resume it with:", markup=False)
            console.print(f"  orchestrate resume {name}", markup=False)


def ui(name: str | None, root: Path, port: int, *, open_browser: bool = False) -> ExitCode:
    """Serve the MLflow UI on localhost until Ctrl-C and print the URL of the sweep's charts."""

    spec, sweep_id = (None, "") if name is None else _stored_sweep(existing_sweep(root, name))
    tracking = spec.tracking if spec is not None else Tracking()
    uri = tracking_uri(root, tracking.uri)
    with SignalHandler(lambda: "") as signals:
        shown = start_ui(root, uri, port=port)
        try:
            page = shown.base
            if spec is not None and sweep_id:
                view = saved_view(spec, sweep_id, time.time())
                page = sweep_page(page, root, shown.uri, tracking.experiment, sweep_id, view, tracking.artifacts)
            sys.stdout.write(f"{page}\n")
            sys.stdout.flush()
            if open_browser:
                import webbrowser

                webbrowser.open(page)
            if shown.copy is not None:
                sys.stderr.write("the tracking store cannot be written by this user: the page shows it as it is now\n")
            if shown.process is not None:
                sys.stderr.write("serving on this machine only; stop with Ctrl-C\n")
                while not signals.stop_requested and shown.process.poll() is None:
                    time.sleep(0.2)
        finally:
            shown.stop()
    return ExitCode.DONE


def _stored_sweep(folder: SweepFolder) -> tuple[SweepSpec, str]:
    """Return the spec of a sweep and its id, without any of the files that it names; no id before its first trial."""
    if not Study.exists(folder):
        return load_spec(folder.spec, is_new=False), ""
    with Study.open(folder, read_only=True) as study:
        return study.spec, study.id


def end_orphaned_runs(name: str, root: Path) -> None:
    """End the sweep's runs in MLflow if its driver was killed; called by commands that look at it."""
    orphaned_runs.end_orphaned_runs(
        existing_sweep(root, name), DashboardReporter(), lambda text: click.echo(text, err=True)
    )


def print_summary(folder: SweepFolder, spec: SweepSpec, ended: StopReason) -> ExitCode:
    """Print the table of trials, the best configuration and the next commands; return the exit code."""
    progress = Console(stderr=True)
    resume_line = f"  orchestrate resume {spec.name}"
    records: Sequence[TrialRecord] = []
    if Study.exists(folder):
        with Study.open(folder, read_only=True) as study:
            records = study.trials()
            curves = [_trial_curves(study, record) for record in records]
        console = wide_console()
        print_final_summary(spec, curves, console, steps=known_steps(folder, spec))
        _print_findings(folder, console)
    any_complete = any(r.value is not None for r in records)
    if ended.text and ended.kind is not StopKind.FINISHED:
        progress.print(f"{ended.kind.value}: {ended.text}", markup=False, soft_wrap=True)
    if ended.kind is not StopKind.FINISHED:
        progress.print(f"Resume it with:\n{resume_line}", markup=False, soft_wrap=True)
    if any_complete:
        progress.print(
            f"Next:\n  orchestrate best {spec.name} --export DIR\n  orchestrate ui {spec.name}\n"
            f"  orchestrate report {spec.name}\n  orchestrate status {spec.name}",
            markup=False,
            soft_wrap=True,
        )
    return _exit_code(ended.kind, any_complete)


def _print_findings(folder: SweepFolder, console: Console) -> None:
    with Study.open(folder, read_only=True) as study:
        frame = load_frame(study, state="finished")
    if frame.ranked:
        print_findings(diagnose(frame), frame.name, console)


def _trial_curves(study: Study, record: TrialRecord) -> TrialCurves:
    curves = TrialCurves(record)
    curves.add(study.metric_history(record.number))
    return curves


def _exit_code(kind: StopKind, any_complete: bool) -> ExitCode:
    match kind:
        case StopKind.INTERRUPTED | StopKind.STOPPED | StopKind.PAUSED | StopKind.ONLY_PAUSED_LEFT:
            return ExitCode.INTERRUPTED
        case StopKind.NO_DISK:
            return ExitCode.REFUSED
        case StopKind.WORKERS_LOST:
            return ExitCode.INTERNAL_ERROR
        case StopKind.SAME_BUG:
            return ExitCode.INTERNAL_ERROR if any_complete else ExitCode.NO_TRIAL_COMPLETED
        case StopKind.FINISHED | StopKind.OUT_OF_BUDGET | StopKind.TARGET:
            return ExitCode.DONE if any_complete else ExitCode.NO_TRIAL_COMPLETED
