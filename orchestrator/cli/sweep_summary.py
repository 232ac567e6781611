"""A sweep in the terminal: its progress while another process runs it, and the final summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dashboards.analysis.load_frame import load_frame
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.diagnose import diagnose
from dashboards.formatting import wide_console
from dashboards.terminal.progress_views import open_view
from dashboards.terminal.trial_tables import print_final_summary, print_findings
from orchestrator import folders
from orchestrator.commands.status import sweep_state
from orchestrator.driver.data_stage import updates_if_known
from orchestrator.errors import ExitCode
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.spec.estimates.sweep_plan import total_trials
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState

_WATCH_SECONDS = 1.0
"""Seconds between two reads of the study by `status --watch`."""
_REFRESHES_PER_READ = 4
"""Refreshes of the view between two reads, for changes that it has not drawn yet."""


def watch_sweep(name: str, root: Path) -> None:
    """Show the progress of a sweep that another process runs, until its end or Ctrl-C; then print the summary."""
    folder = existing_sweep(root, name)
    while not Study.exists(folder) and folders.lock_holder(folder):
        time.sleep(_WATCH_SECONDS)
    with Study.open(folder, read_only=True) as study:
        spec, updates_of = study.spec, updates_if_known(folder, study.spec)
        console = Console(stderr=True)
        before = study.usage().hours * 3600
        view = open_view(spec, console, total=total_trials(spec), updates_of=updates_of, before=before)
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
        print_final_summary(spec, views, wide_console(), updates_of=updates_of)
        if sweep_state(study) == "interrupted":
            reason = study.stop_reason()
            console.print(f"{name} is interrupted{f': {reason}' if reason else ''}. Resume it with:", markup=False)
            console.print(f"  orchestrate resume {name}", markup=False)


def print_summary(folder: SweepFolder, spec: SweepSpec, stop_reason: StopReason) -> ExitCode:
    """Print the table of trials, the best configuration and the next commands; return the exit code."""
    progress = Console(stderr=True)
    resume_line = f"  orchestrate resume {spec.name}"
    records: Sequence[TrialRecord] = []
    if Study.exists(folder):
        with Study.open(folder, read_only=True) as study:
            records = study.trials()
            curves = [_trial_curves(study, record) for record in records]
        console = wide_console()
        print_final_summary(spec, curves, console, updates_of=updates_if_known(folder, spec))
        _print_findings(folder, console)
    any_complete = any(r.value is not None for r in records)
    if stop_reason.text and stop_reason.kind is not StopKind.FINISHED:
        progress.print(f"{stop_reason.kind.value}: {stop_reason.text}", markup=False, soft_wrap=True)
    if stop_reason.kind is not StopKind.FINISHED:
        progress.print(f"Resume it with:\n{resume_line}", markup=False, soft_wrap=True)
    if any_complete:
        progress.print(
            f"Next:\n  orchestrate best {spec.name} --export DIR\n  orchestrate ui {spec.name}\n"
            f"  orchestrate report {spec.name}\n  orchestrate status {spec.name}",
            markup=False,
            soft_wrap=True,
        )
    return _exit_code(stop_reason.kind, any_complete)


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
