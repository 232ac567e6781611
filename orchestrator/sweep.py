"""The composition root: what each command does, with everything it needs put together."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dashboards.terminal import open_view
from orchestrator.commands.export import export
from orchestrator.commands.look import best, status, watch
from orchestrator.driving import lock
from orchestrator.engine.cluster import Slots, cluster, plan_slots
from orchestrator.engine.stopping import Interrupt, Interrupted, Stop, StopKind
from orchestrator.errors import DataError, ExitCode, SpecError
from orchestrator.folders import SweepFolder, existing, fresh
from orchestrator.spec.dump import dump
from orchestrator.spec.load import load, loads
from orchestrator.spec.plan import total_trials
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.study import Study

if TYPE_CHECKING:
    from orchestrator.engine.view import View

__all__ = ["best", "export", "resume", "start", "status", "stop", "ui", "watch"]


def start(spec: SweepSpec, root: Path, *, trust_remote_code: bool = False) -> ExitCode:
    """Run a new sweep to its end. NameTaken before anything is written; DataError before the first trial."""
    folder = fresh(root, spec.name)
    slots = plan_slots(spec)
    root.mkdir(parents=True, exist_ok=True)
    folder.path.mkdir()
    with lock.hold(folder):
        folder.spec.write_text(dump(spec), encoding="utf-8")
        try:
            return _drive(folder, spec, slots, trust_remote_code)
        except (SpecError, DataError):
            if not Study.exists(folder):  # nothing was begun: the name stays free
                shutil.rmtree(folder.path)
            raise


def resume(name: str, root: Path, overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> ExitCode:
    """Go on with a sweep; `overrides` may change its budget, resources, tracking and keep_models."""
    folder = existing(root, name)
    with lock.hold(folder):
        if Study.exists(folder):
            with Study.open(folder) as study:
                spec = study.spec
                if overrides:
                    spec = loads(dump(spec), folder.path, overrides, source=str(folder.spec))
                    study.amend(spec)
                    _replace(folder.spec, dump(spec))
        else:
            spec = load(folder.spec, overrides)
        return _drive(folder, spec, plan_slots(spec), trust_remote_code)


def stop(name: str, root: Path, trial: int | None = None) -> None:
    """Ask the driver of a sweep to stop it, or one trial of it."""
    folder = existing(root, name)
    with Study.open(folder) as study:
        study.request("stop", "stopped by `orchestrate stop`", trial=trial)


def ui(name: str | None, root: Path, port: int, *, open_browser: bool = False) -> ExitCode:
    """Serve the MLflow pages on loopback until Ctrl-C; prints the address of the sweep's runs."""
    from orchestrator.spec.sweep import Tracking
    from orchestrator.tracking.mlflow import tracking_uri
    from orchestrator.tracking.ui import experiment_id, runs_url, start_ui

    spec = load(existing(root, name).spec) if name is not None else None
    tracking = spec.tracking if spec is not None else Tracking()
    uri = tracking_uri(root, tracking.uri)
    with Interrupt(lambda: "") as interrupt:
        shown = start_ui(root, uri, port=port)
        try:
            page = shown.base
            if spec is not None:
                page = runs_url(page, experiment_id(root, uri, tracking.experiment), spec.name, spec.goal)
            sys.stdout.write(f"{page}\n")
            sys.stdout.flush()
            if open_browser:
                import webbrowser

                webbrowser.open(page)
            if shown.process is not None:
                sys.stderr.write("serving on this machine only; Ctrl-C ends it\n")
                while not interrupt.asked and shown.process.poll() is None:
                    time.sleep(0.2)
        finally:
            shown.stop()
    return ExitCode.DONE


# --- driving ---------------------------------------------------------------------------------------------------------


def _drive(folder: SweepFolder, spec: SweepSpec, slots: Slots, trust_remote_code: bool) -> ExitCode:
    from orchestrator.driving.drive import drive, farewell
    from orchestrator.engine.attempt import open_workshop

    console = Console(stderr=True)
    opened = functools.partial(open_workshop, trust_remote_code=trust_remote_code)
    with Interrupt(lambda: f"Resume it with:\n  orchestrate resume {spec.name}") as interrupt:
        with _viewing(spec, console) as view:
            view.stage("starting Ray")
            try:
                with cluster(folder.path / "ray", slots, interrupt):
                    ended = drive(folder, spec, slots, view, interrupt, opened)
            except Interrupted:
                ended = Stop(StopKind.INTERRUPTED)
        return farewell(folder, spec, ended, console)


@contextmanager
def _viewing(spec: SweepSpec, console: Console) -> Generator[View]:
    view = open_view(spec, console, total=total_trials(spec))
    try:
        yield view
    finally:
        view.close()


def _replace(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
