"""The composition root: what each command does, with everything it needs put together."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import folders
from orchestrator.driver.crash_report import free_folder, leave_trace, make_folder
from orchestrator.driver.preflight import NoRoom, bring, check_elsewhere, check_extras, check_room, refuse_taken
from orchestrator.errors import DataError, NameTaken, NoSuchSweep, SpecError
from orchestrator.execution.local_cluster import (
    RayDied,
    Slots,
    cluster,
    gpu_memory,
    plan_slots,
    threads_of,
    worker_environment,
)
from orchestrator.execution.remote_cluster import Asked, ClusterError, joined
from orchestrator.execution.stop_reasons import Interrupt, Interrupted, Stop, StopKind
from orchestrator.folders import SweepFolder, existing, known_sweeps
from orchestrator.mirror import MirrorError
from orchestrator.spec.estimates.cost_estimate import check_share
from orchestrator.spec.estimates.sweep_plan import total_trials
from orchestrator.spec.loading.loader import load, loads
from orchestrator.spec.loading.serialization import dump, spec_hash
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.sampling.warm_start import warm_start
from orchestrator.study.study import Study
from trainer.storage.atomic_files import write_text

if TYPE_CHECKING:
    from orchestrator.interfaces import Presentation, View

_RAY_DEATHS = 3
"""How often Ray is started again in one driver's life."""


def start(
    spec: SweepSpec,
    root: Path,
    presentation: Presentation,
    *,
    cluster_at: Asked | None = None,
    trust_remote_code: bool = False,
) -> Stop:
    """Run a new sweep to its end, on this machine or on a cluster that exists.

    NameTaken before anything is written; DataError before the first trial.
    """
    folder = free_folder(root, spec.name)
    warm_start(spec, root)  # refused before anything is written
    check_elsewhere(spec, root)
    refuse_taken(spec)
    if cluster_at is None:
        _check_here(folder, spec)
    if told := make_folder(folder, dump(spec)):
        sys.stderr.write(f"{told}\n")
    with folders.hold(folder):
        try:
            return _drive(folder, spec, presentation, cluster_at, trust_remote_code)
        except (SpecError, DataError, ClusterError, NoRoom, MirrorError, KeyboardInterrupt):
            if not Study.exists(folder):  # nothing was begun: the name stays free
                shutil.rmtree(folder.path)
            raise


def start_or_resume(
    spec: SweepSpec,
    root: Path,
    presentation: Presentation,
    *,
    cluster_at: Asked | None = None,
    trust_remote_code: bool = False,
) -> Stop:
    """Run this sweep, or go on with it where it has begun: what a scheduler may start again and again.

    NameTaken where another sweep has the name. What was amended since the beginning stays amended.
    """
    try:
        folder = existing(root, spec.name)
    except NoSuchSweep:
        folder = None if spec.mirror is None else bring(spec.name, root, spec.mirror)
    if folder is None:
        return start(spec, root, presentation, cluster_at=cluster_at, trust_remote_code=trust_remote_code)
    begun = load(folder.spec)
    if Study.exists(folder):
        with Study.open(folder) as study:
            begun = SweepSpec.model_validate_json(study.spec_history()[0].text)
    if spec_hash(begun) != spec_hash(spec):
        raise NameTaken(spec.name, folder.path)
    return resume(spec.name, root, presentation, cluster_at=cluster_at, trust_remote_code=trust_remote_code)


def resume(
    name: str,
    root: Path,
    presentation: Presentation,
    overrides: Sequence[str] = (),
    *,
    mirror: str | None = None,
    cluster_at: Asked | None = None,
    trust_remote_code: bool = False,
) -> Stop:
    """Go on with a sweep; `overrides` may change its budget, resources, tracking, notify, judge and keep_models.

    Where this disk does not have it, what is in `mirror`, a URL, is brought first.
    """
    if mirror is not None and name not in known_sweeps(root) and bring(name, root, mirror) is None:
        raise MirrorError(f"there is no sweep named {name!r} in {mirror}")
    folder = existing(root, name)
    with folders.hold(folder):
        if Study.exists(folder):
            with Study.open(folder) as study:
                spec = study.spec
                if overrides:
                    spec = loads(dump(spec), folder.path, overrides, source=str(folder.spec))
                    for change in study.amend(spec):
                        sys.stderr.write(f"changed {change}\n")
                if folder.spec.read_text(encoding="utf-8") != dump(spec):
                    write_text(folder.spec, dump(spec))
        else:
            spec = load(folder.spec, overrides)
        check_elsewhere(spec, root)
        if cluster_at is None:
            _check_here(folder, spec)
        return _drive(folder, spec, presentation, cluster_at, trust_remote_code)


def _check_here(folder: SweepFolder, spec: SweepSpec) -> None:
    """Whether this machine has what the sweep takes."""
    check_extras(spec)
    slots = plan_slots(spec)
    check_share(spec, gpu_memory())
    check_room(folder, spec, slots)


# --- driving ---------------------------------------------------------------------------------------------------------


def _drive(
    folder: SweepFolder,
    spec: SweepSpec,
    presentation: Presentation,
    cluster_at: Asked | None,
    trust_remote_code: bool,
) -> Stop:
    try:
        return _driven(folder, spec, presentation, cluster_at, trust_remote_code)
    except Exception as error:
        left = leave_trace(folder, error, presentation.reporter)
        if left is error:
            raise
        raise left from error


def _driven(
    folder: SweepFolder,
    spec: SweepSpec,
    presentation: Presentation,
    cluster_at: Asked | None,
    trust_remote_code: bool,
) -> Stop:
    from orchestrator.driver.judge_stage import judge_after, key_of
    from orchestrator.driver.notifications import notifying
    from orchestrator.driver.sweep_driver import drive
    from orchestrator.execution.workers.attempt_runner import open_workshop
    from orchestrator.execution.workers.data_process import Preparing

    endpoint = None if spec.judge is None else spec.judge.endpoint
    if endpoint is not None and endpoint.max_cost is not None:
        key_of(endpoint, spec.name)  # missing after days of training, it would be too late
    opened = functools.partial(open_workshop, trust_remote_code=trust_remote_code)
    with Interrupt(lambda: f"Resume it with:\n  orchestrate resume {spec.name}") as interrupt:
        with (
            _viewing(spec, presentation) as shown,
            notifying(folder, spec, shown) as (view, tell_end),
            Preparing(
                folder.cache,
                spec.base,
                worker_environment(threads_of(spec)),
                interrupt,
                view.tick,
                trust_remote_code=trust_remote_code,
            ) as data,
        ):
            ended: Stop | None = None
            deaths = 0
            while ended is None:
                try:
                    with _machines(folder, spec, cluster_at, interrupt, view) as slots:
                        ended = drive(folder, spec, slots, view, interrupt, opened, data, presentation.reporter)
                except Interrupted:
                    ended = Stop(StopKind.INTERRUPTED)
                except RayDied as why:
                    if interrupt.asked:  # whoever ended this process ended Ray with it
                        ended = Stop(StopKind.INTERRUPTED)
                        continue
                    deaths += 1
                    if deaths > _RAY_DEATHS:
                        raise
                    view.say(f"{why}; starting it again, running trials go on from their newest checkpoints")
            judge_after(folder, ended, view, interrupt, presentation.reporter, trust_remote_code=trust_remote_code)
            tell_end(ended)
        return ended


@contextmanager
def _machines(
    folder: SweepFolder, spec: SweepSpec, cluster_at: Asked | None, interrupt: Interrupt, view: View
) -> Generator[Slots]:
    """Ray on this machine, or the cluster that was asked for; what trials get of it."""
    if cluster_at is None:
        view.stage("starting Ray")
        slots = plan_slots(spec)
        with cluster(folder.path / "ray", slots, interrupt):
            yield slots
        return
    view.stage("joining the Ray cluster")
    with joined(folder.path / "ray", spec, cluster_at, interrupt, view) as slots:
        check_room(folder, spec, slots)
        yield slots


@contextmanager
def _viewing(spec: SweepSpec, presentation: Presentation) -> Generator[View]:
    view = presentation.open_view(spec, total_trials(spec))
    try:
        yield view
    finally:
        view.close()
