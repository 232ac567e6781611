"""`start`, `resume` and `start_or_resume`: take the sweep's lock, connect to the cluster, restart Ray after a crash."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import folders
from orchestrator.driver.checkpoint_retention import CheckpointRetention
from orchestrator.driver.crash_report import free_folder, make_folder, record_crash
from orchestrator.driver.parent_run import attach_report, end_parent_run, open_sink
from orchestrator.driver.preflight import (
    check_access,
    check_disk_space,
    check_layers,
    check_mirror_free,
    restore_from_mirror,
)
from orchestrator.driver.spec_changes import apply_changes, changed_spec, retry_trials, with_overrides
from orchestrator.errors import DataError, NameTaken, NoSuchSweep, SpecError, StorageRefused
from orchestrator.execution.local_cluster import RayDied, local_cluster, worker_environment
from orchestrator.execution.remote_cluster import ClusterAddress, ClusterError, connect_cluster
from orchestrator.execution.slots import Slots, gpu_memory, machine_gpus, plan_slots, threads_per_process
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted, StopKind, StopReason
from orchestrator.execution.user_requests import end_unfinished_trials
from orchestrator.folders import WAITING_FILE, SweepFolder, existing_sweep, known_sweeps
from orchestrator.gpu_locks import GpusBusy, reserved_gpus
from orchestrator.gpus import hidden_gpus
from orchestrator.mirror import MirrorError
from orchestrator.spec.estimates.arrangement import arranged
from orchestrator.spec.estimates.cost_estimate import check_share
from orchestrator.spec.estimates.gpu_layouts import Arrangement
from orchestrator.spec.estimates.sweep_plan import planned_trials
from orchestrator.spec.loading.file_rights import FileRights
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.spec.pruners import NoPruner
from orchestrator.spec.requirements import default_requirements
from orchestrator.spec.samplers import GridSampler
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.sampling.warm_start import warm_start
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import spec_differences
from orchestrator.study.trial_records import STOPPING, RequestKind
from orchestrator.tracking.tracking_store import settle_tracking_uri
from trainer.results import clause
from trainer.storage.atomic_files import write_text

if TYPE_CHECKING:
    from orchestrator.interfaces import Presentation, ProgressView, SweepReporter

_DELIVERY_SECONDS = 30.0
_MAX_RAY_RESTARTS = 3
"""Restarts of Ray per driver."""


def start(
    spec: SweepSpec,
    root: Path,
    presentation: Presentation,
    *,
    cluster_at: ClusterAddress | None = None,
    trust_remote_code: bool = False,
    waits: bool = True,
) -> StopReason:
    """Run a new sweep on this machine or on an existing cluster.

    Args:
        spec: the sweep.
        root: the runs folder.
        presentation: progress view and reporter.
        cluster_at: address of a Ray cluster; None for this machine.
        trust_remote_code: whether Python code of the model's repository may run.
        waits: whether to wait for GPUs that other sweeps of this machine have.

    Returns:
        Why the sweep ended.

    Raises:
        NameTaken, SpecError, DataError, ModelError, MirrorError, StorageRefused: before anything is written.
        ClusterError, DataError, GpusBusy: before the first trial.
    """
    folder = free_folder(root, spec.name)
    warm_start(spec, root)  # raises before anything is written
    check_access(folder, spec, is_new=True)
    check_mirror_free(spec)
    if cluster_at is None:
        _check_machine(folder, spec, is_new=True)
    if message := make_folder(folder, dump_spec(spec)):
        sys.stderr.write(f"{message}\n")
    with folders.sweep_lock(folder):
        try:
            return _drive(folder, spec, presentation, cluster_at, trust_remote_code, waits)
        except (SpecError, DataError, ClusterError, StorageRefused, MirrorError, GpusBusy, KeyboardInterrupt):
            if not Study.exists(folder):  # no study yet: the name stays free
                shutil.rmtree(folder.path)
            raise


def start_or_resume(
    spec: SweepSpec,
    root: Path,
    presentation: Presentation,
    *,
    cluster_at: ClusterAddress | None = None,
    trust_remote_code: bool = False,
    waits: bool = True,
) -> StopReason:
    """Start this sweep, or resume it if it exists; for schedulers that restart a job.

    Settings that were changed by a resume keep their new values. Arguments as for `start`.

    Raises:
        NameTaken: another sweep has this name.
    """
    try:
        folder = existing_sweep(root, spec.name)
    except NoSuchSweep:
        folder = None if spec.mirror is None else restore_from_mirror(spec.name, root, spec.mirror)
    if folder is None:
        return start(spec, root, presentation, cluster_at=cluster_at, trust_remote_code=trust_remote_code, waits=waits)
    original = load_spec(folder.spec, is_new=False)
    if Study.exists(folder):
        with Study.open(folder) as study:
            original = SweepSpec.from_stored(study.spec_history()[0].text)
    if sweep_identity(original) not in {sweep_identity(each) for each in _as_begun_earlier(spec)}:
        raise NameTaken(spec.name, folder.path)
    return resume(
        spec.name, root, presentation, cluster_at=cluster_at, trust_remote_code=trust_remote_code, waits=waits
    )


def _as_begun_earlier(spec: SweepSpec) -> list[SweepSpec]:
    """Return the sweep, and as earlier versions began it from the same file: without `sampler.order`, without default
    requirements, without a default pruner.
    """
    defaults = default_requirements(spec.base)
    stated = {"require": tuple(requirement for requirement in spec.require if requirement not in defaults)}
    begun = [spec, spec.model_copy(update=stated)]
    if spec.pruner == spec.default_pruner:
        begun += [each.model_copy(update={"pruner": NoPruner()}) for each in begun]
    if isinstance(spec.sampler, GridSampler):
        begun += [each.model_copy(update={"sampler": GridSampler()}) for each in begun]
    return begun


def resume(
    name: str,
    root: Path,
    presentation: Presentation,
    overrides: Sequence[str] = (),
    *,
    mirror: str | None = None,
    cluster_at: ClusterAddress | None = None,
    trust_remote_code: bool = False,
    retry_failed: bool = False,
    waits: bool = True,
) -> StopReason:
    """Resume a sweep. Trials for whose common bug it stopped are tried again.

    Args:
        name: the sweep.
        root: the runs folder.
        presentation: progress view and reporter.
        overrides: changes as PATH=VALUE of settings that no result depends on (`sweep_terms.AMENDABLE`), wider lists
            and ranges of the search, and new places of data and models, whose contents are compared.
        mirror: URL from which the sweep is restored if this disk does not have it.
        cluster_at: address of a Ray cluster; None for this machine.
        trust_remote_code: whether Python code of the model's repository may run.
        retry_failed: whether all failed trials are tried again.
        waits: whether to wait for GPUs that other sweeps of this machine have.

    Returns:
        Why the sweep ended.

    Raises:
        MirrorError: `mirror` has no such sweep.
        SpecChanged, SearchNarrowed, BudgetUsedUp: a change is refused; nothing was changed.
        NoSuchSweep, SpecError, DataError, ClusterError, DiskTooSmall, GpusBusy: before the next trial.
    """
    if mirror is not None and name not in known_sweeps(root) and restore_from_mirror(name, root, mirror) is None:
        raise MirrorError(f"there is no sweep named {name!r} in {mirror}")
    folder = existing_sweep(root, name)
    with folders.sweep_lock(folder):
        has_study = Study.exists(folder)
        spec = (
            changed_spec(folder, overrides, root, trust_remote_code=trust_remote_code)
            if has_study
            else load_spec(folder.spec, overrides)
        )
        check_access(folder, spec, is_new=not has_study)
        if cluster_at is None:
            _check_machine(folder, spec, is_new=not has_study)
        if has_study:
            _apply_changes(folder, spec, retry_failed=retry_failed)
        return _drive(folder, spec, presentation, cluster_at, trust_remote_code, waits)


def change_settings(name: str, root: Path, overrides: Sequence[str], rights: FileRights) -> list[str]:
    """Change a sweep that no driver runs as `resume` with these overrides does, for its next driver.

    Args:
        name: the sweep.
        root: the runs folder.
        overrides: changes as PATH=VALUE, as of `resume`.
        rights: what they may name.

    Returns:
        A sentence for each setting that changed.

    Raises:
        As `resume`; nothing was changed.
    """
    folder = existing_sweep(root, name)
    with folders.sweep_lock(folder):
        has_study = Study.exists(folder)
        if has_study:
            spec = changed_spec(folder, overrides, root, rights=rights)
        else:
            spec = with_overrides(load_spec(folder.spec, is_new=False), overrides, rights)
        check_access(folder, spec, is_new=not has_study)
        _check_machine(folder, spec, is_new=not has_study)
        if has_study:
            with Study.open(folder) as study:
                return apply_changes(study, spec)
        before = load_spec(folder.spec, is_new=False)
        write_text(folder.spec, dump_spec(spec))
        return [f"changed {change}" for change in spec_differences(before, spec)]


def _apply_changes(folder: SweepFolder, spec: SweepSpec, *, retry_failed: bool) -> None:
    """Retry failed trials where the user asked for it, or where the sweep stopped for their bug; amend the spec."""
    with Study.open(folder) as study:
        for notice in (*retry_trials(study, retry_failed=retry_failed), *apply_changes(study, spec)):
            sys.stderr.write(f"{notice}\n")


def abandon(name: str, root: Path, reporter: SweepReporter, reason: str, log: Callable[[str], None]) -> int:
    """End a sweep that no driver runs: unfinished trials become PRUNED, its runs in tracking end; return how many.

    Its results stay. A later resume would begin new trials only.

    Raises:
        NoSuchSweep, SweepHeld: nothing was changed.
    """
    folder = existing_sweep(root, name)
    with folders.sweep_lock(folder), Study.open(folder) as study:
        study.start_driving()
        sink = open_sink(study, root, reporter)
        try:
            study.add_event(STOPPING, f"{StopKind.ABANDONED.value}: {reason}")
            ended = end_unfinished_trials(study, sink, reason)
            CheckpointRetention(folder, study.spec, study.trials())
            if study.trials():
                attach_report(study, sink, reporter, log, StopKind.ABANDONED.value)
            end_parent_run(study, sink, StopKind.ABANDONED.name, "KILLED", reason)
        finally:
            left = sink.close(_DELIVERY_SECONDS)
        if left:
            log(f"tracking: {left} messages are queued in {folder.outbox}; the same command delivers them later")
        return len(ended)


def _check_machine(folder: SweepFolder, spec: SweepSpec, *, is_new: bool) -> None:
    """Check this machine's GPUs and disk space for the sweep."""
    spec, _ = arranged(spec, [machine_gpus()], is_new=is_new)
    slots = plan_slots(spec)
    if not slots.gpus and spec.resources.gpus_per_trial is None and (message := hidden_gpus()):
        sys.stderr.write(f"{message}\n")
    check_layers(spec, slots)
    check_share(spec, gpu_memory())
    check_disk_space(folder, spec, slots)


# --- the driver ------------------------------------------------------------------------------------------------------


def _drive(
    folder: SweepFolder,
    spec: SweepSpec,
    presentation: Presentation,
    cluster_at: ClusterAddress | None,
    trust_remote_code: bool,
    waits: bool,
) -> StopReason:
    try:
        if message := settle_tracking_uri(folder, spec.tracking.uri):
            sys.stderr.write(f"{message}\n")
        return _run_driver(folder, spec, presentation, cluster_at, trust_remote_code, waits)
    except StageInterrupted:  # while waiting for GPUs
        return StopReason(StopKind.INTERRUPTED)
    except Exception as error:
        to_raise = record_crash(folder, error, presentation.reporter)
        if to_raise is error:
            raise
        raise to_raise from error


def _run_driver(
    folder: SweepFolder,
    spec: SweepSpec,
    presentation: Presentation,
    cluster_at: ClusterAddress | None,
    trust_remote_code: bool,
    waits: bool,
) -> StopReason:
    from orchestrator.driver.judge_stage import endpoint_key, judge_after_sweep
    from orchestrator.driver.notifications import notify_events
    from orchestrator.execution.workers.attempt_runner import open_session
    from orchestrator.execution.workers.data_process import DataProcess

    endpoint = None if spec.judge is None else spec.judge.endpoint
    if endpoint is not None and endpoint.max_cost is not None:
        endpoint_key(endpoint, spec.name)  # a missing key is reported before training
    session_opener = functools.partial(open_session, trust_remote_code=trust_remote_code)
    with SignalHandler(lambda: f"Resume it with:\n  orchestrate resume {spec.name}") as signals:
        with (
            _open_view(folder, spec, presentation) as base_view,
            notify_events(folder, spec, base_view) as (view, notify_end),
            _own_gpus(folder, spec, cluster_at, signals, view, waits=waits),
            DataProcess(
                folder.cache,
                spec.base,
                worker_environment(threads_per_process(spec)),
                signals,
                view.refresh,
                trust_remote_code=trust_remote_code,
            ) as data,
        ):
            stop_reason: StopReason | None = None
            ray_deaths = 0
            while stop_reason is None:
                try:
                    with _cluster(folder, spec, cluster_at, signals, view) as (slots, arrangement):
                        from orchestrator.driver.sweep_driver import drive  # Ray Tune: loads while workers load Ray

                        stop_reason = drive(
                            folder, spec, slots, view, signals, session_opener, data, presentation.reporter, arrangement
                        )
                except StageInterrupted:
                    stop_reason = StopReason(StopKind.INTERRUPTED)
                except RayDied as error:
                    if signals.received:  # the signal to this process also stopped Ray
                        stop_reason = StopReason(StopKind.INTERRUPTED)
                        continue
                    ray_deaths += 1
                    if ray_deaths > _MAX_RAY_RESTARTS:
                        raise
                    view.log(f"{clause(error)}; restarting Ray, running trials continue from their newest checkpoints")
            judge_after_sweep(
                folder, stop_reason, view, signals, presentation.reporter, trust_remote_code=trust_remote_code
            )
            notify_end(stop_reason)
        return stop_reason


@contextmanager
def _own_gpus(
    folder: SweepFolder,
    spec: SweepSpec,
    cluster_at: ClusterAddress | None,
    signals: SignalHandler,
    view: ProgressView,
    *,
    waits: bool,
) -> Generator[None]:
    """Hold the GPUs of this machine that the sweep uses, until it ends; a shared cluster gives its own by itself."""
    if cluster_at is not None:
        yield
        return
    file, shown = folder.path / WAITING_FILE, ""

    def wait(sentence: str) -> None:
        """Show for whom the sweep waits; raises StageInterrupted on a signal or a request to stop."""
        nonlocal shown
        if signals.received or _is_stop_requested(folder):
            raise StageInterrupted
        if sentence != shown:
            shown = sentence
            view.set_activity(sentence)
            write_text(file, f"{os.getpid()}\n{sentence}\n")
        view.refresh()

    chosen, _ = arranged(spec, [machine_gpus()], is_new=not Study.exists(folder))
    least, most = plan_slots(chosen).gpus_needed
    with ExitStack() as stack:
        try:
            stack.enter_context(reserved_gpus(spec.name, least, most, waits=waits, on_wait=wait))
        finally:
            file.unlink(missing_ok=True)
        yield


def _is_stop_requested(folder: SweepFolder) -> bool:
    if not Study.exists(folder):
        return False
    with Study.open(folder, read_only=True) as study:
        return any(request.kind == RequestKind.STOP and request.trial is None for request in study.requests())


@contextmanager
def _cluster(
    folder: SweepFolder, spec: SweepSpec, cluster_at: ClusterAddress | None, signals: SignalHandler, view: ProgressView
) -> Generator[tuple[Slots, Arrangement | None]]:
    """Start Ray on this machine or connect to the given cluster; yield its slots and the arrangement of the trials."""
    is_new = not Study.exists(folder)
    if cluster_at is None:
        view.set_activity("starting Ray")
        chosen, arrangement = arranged(spec, [machine_gpus()], is_new=is_new)
        slots = plan_slots(chosen)
        with local_cluster(folder.path / "ray", slots, signals):
            yield slots, arrangement
        return
    view.set_activity("joining the Ray cluster")
    with connect_cluster(folder.path / "ray", spec, cluster_at, signals, view, is_new=is_new) as (slots, arrangement):
        check_disk_space(folder, spec, slots)
        yield slots, arrangement


@contextmanager
def _open_view(folder: SweepFolder, spec: SweepSpec, presentation: Presentation) -> Generator[ProgressView]:
    is_new = not Study.exists(folder)  # else nothing is counted until earlier trials are known
    view = presentation.open_view(spec, planned_trials(spec) if is_new else None)
    try:
        yield view
    finally:
        view.close()
