"""Drivers in this process: the view and the reporter that they need come from `dashboards`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from rich.console import Console

from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.progress_views import open_view
from orchestrator.commands.request_commands import RequestRefused, current_user
from orchestrator.driver import parent_run, run_sweep
from orchestrator.errors import ExitCode
from orchestrator.execution.remote_cluster import ClusterAddress
from orchestrator.execution.stop_reasons import StopReason, exit_code
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.interfaces import Presentation
from orchestrator.loopback import bypass_proxies
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.retried_trials import never_trained
from orchestrator.study.study import Study


def presentation(*, show_progress: bool = True) -> Presentation:
    """Return the terminal's progress view, or one that prints nothing, and the dashboards' reporter."""
    return Presentation(
        open_view=lambda spec, total: open_view(spec, Console(stderr=True, quiet=not show_progress), total=total),
        reporter=DashboardReporter(),
    )


class RunOptions(TypedDict, total=False):
    """How a sweep is run, as for `orchestrator.driver.run_sweep`."""

    cluster_at: ClusterAddress | None
    trust_remote_code: bool
    waits: bool


class ResumeOptions(RunOptions, total=False):
    """How a sweep is resumed, as for `orchestrator.driver.run_sweep.resume`."""

    mirror: str | None
    retry_failed: bool


def start(
    spec: SweepSpec,
    root: Path,
    *,
    resume_existing: bool = False,
    show_progress: bool = True,
    **options: Unpack[RunOptions],
) -> StopReason:
    """Run a new sweep, or with `resume_existing` resume it if it exists; raises like `run_sweep.start_or_resume`."""
    bypass_proxies()
    begin = run_sweep.start_or_resume if resume_existing else run_sweep.start
    return begin(spec, root, presentation(show_progress=show_progress), **options)


def resume(
    name: str,
    root: Path,
    overrides: Sequence[str] = (),
    *,
    show_progress: bool = True,
    **options: Unpack[ResumeOptions],
) -> StopReason:
    """Resume a sweep; arguments and errors are those of `orchestrator.driver.run_sweep.resume`."""
    bypass_proxies()
    return run_sweep.resume(name, root, presentation(show_progress=show_progress), overrides, **options)


def code_of(folder: SweepFolder, reason: StopReason) -> ExitCode:
    """Return the exit code of a sweep that stopped for this reason."""
    if not StudyReader.exists(folder):
        return exit_code(reason.kind, any_complete=False, any_failed=False)
    with StudyReader.open(folder, read_only=True) as study:
        records = study.trials()
    any_complete = any(record.value is not None for record in records)
    return exit_code(reason.kind, any_complete=any_complete, any_failed=bool(never_trained(records)))


def abandon(folder: SweepFolder, why: str, log: Callable[[str], None]) -> str:
    """End a sweep that no driver runs for good; return what was ended.

    Raises:
        RequestRefused: it has no trials.
        SweepHeld: a driver runs it.
    """
    name = folder.name
    if not Study.exists(folder):
        raise RequestRefused(f"{name} has no trials: there is nothing to end; its folder is {folder.path}")
    reason = f"{why} (by {current_user()})" if why else f"by {current_user()}"
    ended = run_sweep.abandon(name, folder.root, DashboardReporter(), reason, log)
    return f"{name} is abandoned: {ended} unfinished trials ended as PRUNED; results, report and MLflow's runs stay"


def end_orphaned_runs(name: str, root: Path, log: Callable[[str], None]) -> None:
    """End the sweep's runs in MLflow if its driver was killed; called by commands that look at it."""
    parent_run.end_orphaned_runs(existing_sweep(root, name), DashboardReporter(), log)
