"""Drives sweeps through `orchestrator.api` and prints the summary of each; also serves MLflow's UI."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from dashboards.mlflow_pages import saved_view
from orchestrator.api import driving
from orchestrator.cli.sweep_summary import print_summary
from orchestrator.errors import ExitCode
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.sweep_spec import SweepSpec, Tracking
from orchestrator.study.study import Study
from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.mlflow_ui import start_ui, sweep_page
from orchestrator.tracking.tracking_store import check_tracking_store, sweep_tracking_uri


def start(
    spec: SweepSpec, root: Path, *, resume_existing: bool = False, **options: Unpack[driving.RunOptions]
) -> ExitCode:
    """Run a sweep as `driving.start` does and print its summary."""
    stop_reason = driving.start(spec, root, resume_existing=resume_existing, **options)
    return print_summary(SweepFolder(root, spec.name), spec, stop_reason)


def resume(name: str, root: Path, overrides: Sequence[str] = (), **options: Unpack[driving.ResumeOptions]) -> ExitCode:
    """Resume a sweep as `driving.resume` does and print its summary."""
    stop_reason = driving.resume(name, root, overrides, **options)
    folder = existing_sweep(root, name)
    return print_summary(folder, load_spec(folder.spec, is_new=False), stop_reason)


def serve_ui(name: str | None, root: Path, port: int, *, open_browser: bool = False) -> ExitCode:
    """Serve the MLflow UI on localhost until Ctrl-C and print the URL of the sweep's charts."""

    spec, sweep_id = (None, "") if name is None else _stored_sweep(existing_sweep(root, name))
    tracking = spec.tracking if spec is not None else Tracking()
    uri = tracking_uri(root, None) if name is None else sweep_tracking_uri(SweepFolder(root, name), tracking.uri)
    check_tracking_store(uri, tracking.uri)
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
                while not signals.received and shown.process.poll() is None:
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
