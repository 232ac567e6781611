"""A sweep in the terminal: its progress while another process runs it, and the final summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dashboards.analysis.load_frame import load_frame
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.diagnose import diagnose
from dashboards.diagnosis.findings import NO_DIAGNOSIS, reasons_not_to_use
from dashboards.formatting import wide_console
from dashboards.terminal.command_output import resume_command, without_state
from dashboards.terminal.progress_views import open_view
from dashboards.terminal.trial_tables import print_final_summary, print_findings
from orchestrator.api.watched_sweep import Progress, WatchedStudy, WatchedSweep
from orchestrator.commands.rehearsal import is_rehearsal
from orchestrator.driver.data_stage import updates_if_known
from orchestrator.errors import ExitCode
from orchestrator.execution.stop_reasons import StopKind, StopReason, exit_code
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.interfaces import ProgressView
from orchestrator.spec.estimates.sweep_plan import planned_trials
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.retried_trials import never_trained, numbers_text
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord

_WATCH_SECONDS = 1.0
"""Seconds between two reads of the study by `status --watch`."""
_REFRESHES_PER_READ = 4
"""Refreshes of the view between two reads, for changes that it has not drawn yet."""


def watch_sweep(name: str, root: Path) -> None:
    """Show the progress of a sweep that another process runs, until its end or Ctrl-C; then print the summary."""
    folder = existing_sweep(root, name)
    if watch(name, WatchedStudy(folder)).spec is None:
        with Study.open(folder, read_only=True):  # raises StudyMissing
            pass


def watch(name: str, watched: WatchedSweep, program: str = "orchestrate") -> Progress:
    """Show a sweep's progress until its end or Ctrl-C, then the summary; return its last progress.

    `program`: the command, with the options that it needs to find the sweep.
    """
    try:
        return _watch(name, watched, program)
    finally:
        watched.close()


def _watch(name: str, watched: WatchedSweep, program: str) -> Progress:
    shown, progress = "", watched.read()
    while (spec := progress.spec) is None and progress.is_driven:
        if progress.why not in ("", shown):
            shown = progress.why
            sys.stderr.write(f"{shown}\n")
        time.sleep(_WATCH_SECONDS)
        progress = watched.read()
    if spec is None:
        return progress
    console = Console(stderr=True)
    view = open_view(
        spec,
        console,
        total=planned_trials(spec),
        updates_of=progress.updates_of,
        before=progress.seconds,
        running_before=progress.at_work,
    )
    curves: dict[int, TrialCurves] = {}
    try:
        while True:
            if progress.spec is not None and progress.spec != spec:
                spec = progress.spec
                view.change_spec(spec, planned_trials(spec))
            if progress.updates_of is not None:
                view.set_total_updates(progress.updates_of)
            for record in progress.records:
                _show(record, curves, watched, view)
            view.refresh()
            if not progress.is_driven:
                break
            for _ in range(_REFRESHES_PER_READ):
                time.sleep(_WATCH_SECONDS / _REFRESHES_PER_READ)
                view.refresh()
            progress = watched.read()
    finally:
        view.close()
    print_final_summary(spec, list(curves.values()), wide_console(), updates_of=progress.updates_of)
    if progress.state == "interrupted":
        reason = without_state(progress.why, "interrupted")
        console.print(f"{name} is interrupted{f': {reason}' if reason else ''}. Resume it with:", markup=False)
        console.print(f"  {resume_command(name, reason).replace('orchestrate', program, 1)}", markup=False)
    return progress


def _show(record: TrialRecord, shown: dict[int, TrialCurves], watched: WatchedSweep, view: ProgressView) -> None:
    """Show what is new of a trial. One that began again has its curves anew."""
    before = shown.get(record.number)
    if before is None or (before.record.state, before.record.attempts) != (record.state, record.attempts):
        view.update_trial(record)
    if before is None or record.step < before.record.step:
        since, curves = -1, TrialCurves(record)
    else:
        since, curves = before.last_update if before.curves else -1, before
    if before is None or before.record.step != record.step:
        new = watched.metrics(record.number, since)
        curves.add(new)
        view.add_metrics(record.number, new)
    curves.record = record
    shown[record.number] = curves


def print_summary(folder: SweepFolder, spec: SweepSpec, stop_reason: StopReason) -> ExitCode:
    """Print the table of trials, the best configuration and the next commands; return the exit code."""
    progress = Console(stderr=True)
    piped = not progress.is_terminal
    resume_line = f"  {resume_command(spec.name, stop_reason.text)}"
    records: Sequence[TrialRecord] = []
    reasons: Sequence[str] = ()
    nearest: TrialRecord | None = None
    if Study.exists(folder):
        with Study.open(folder, read_only=True) as study:
            records = study.trials()
            nearest = next(iter(study.ranked()), None)
            curves = [_trial_curves(study, record) for record in records]
        console = wide_console()
        print_final_summary(spec, curves, console, updates_of=updates_if_known(folder, spec))
        reasons = _print_findings(folder, console)
    any_complete = any(r.value is not None for r in records)
    fewer = spec.budget.trials is not None and len(records) < spec.budget.trials
    if stop_reason.text and (stop_reason.kind is not StopKind.FINISHED or fewer):
        progress.print(str(stop_reason), markup=False, soft_wrap=piped)
    for line in _failed_lines(spec.name, records, stop_reason.kind):
        progress.print(line, markup=False, soft_wrap=piped)
    if stop_reason.kind not in (StopKind.FINISHED, StopKind.ABANDONED):
        progress.print(f"Resume it with:\n{resume_line}", markup=False, soft_wrap=piped)
    if any_complete:
        _print_next(spec, reasons, nearest, progress)
    return exit_code(stop_reason.kind, any_complete=any_complete, any_failed=bool(never_trained(records)))


def _failed_lines(name: str, records: Sequence[TrialRecord], kind: StopKind) -> list[str]:
    """Return how many configurations were never trained to their end, and how to try them again."""
    failed = never_trained(records)
    if not failed:
        return []
    lines = [
        f"{len(failed)} of {len(records)} trials failed and were never trained to the end: {numbers_text(failed)}."
    ]
    if kind is StopKind.SAME_BUG:
        return [*lines, "Mend the cause first; resumed, the sweep tries those that failed alike again."]
    return [*lines, f"Once the cause is mended:\n  orchestrate resume {name} --retry-failed"]


def _print_findings(folder: SweepFolder, console: Console) -> list[str]:
    """Print the findings, and return the reasons not to use the best trial."""
    with Study.open(folder, read_only=True) as study:
        frame = load_frame(study, state="finished")
    if not frame.ranked:
        return []
    findings = diagnose(frame)
    print_findings(findings, frame.name, console, follow_up=not frame.is_out_of_reach)
    return reasons_not_to_use(findings, frame.ranked[0].label)


def _print_next(spec: SweepSpec, reasons: Sequence[str], first: TrialRecord | None, progress: Console) -> None:
    """Print the next commands; the export only of a model that the diagnosis does not advise against.

    `first`: the best trial, or the nearest to it where none keeps the requirements.
    """
    commands = [f"best {spec.name} --export DIR", f"ui {spec.name}", f"report {spec.name}", f"status {spec.name}"]
    if is_rehearsal(spec):
        text, commands = f"{NO_DIAGNOSIS} Run the same command without --rehearse.\n", commands[1:]
    elif first is not None and not first.keeps_requirements:
        metric = next(name.split(" ")[0] for name, missed in first.violations.items() if missed > 0)
        text = f"No trial to export: none keeps every requirement, trial {first.label} is nearest. If a bound is not "
        text += "meant for this task, another one ranks the trials anew without training.\n"
        change = f"resume {spec.name} --set 'require.{metric}=\"BOUND\"'"
        commands = [f"report {spec.name}", change, *commands[1:2], *commands[3:]]
    elif reasons:
        text, commands = "Do not use the best trial yet; the report has the evidence.\n", commands[1:]
    else:
        text = ""
    listed = "\n".join(f"  orchestrate {command}" for command in commands)
    progress.print(f"{text}Next:\n{listed}", markup=False, soft_wrap=not progress.is_terminal)


def _trial_curves(study: Study, record: TrialRecord) -> TrialCurves:
    curves = TrialCurves(record)
    curves.add(study.metric_history(record.number))
    return curves
