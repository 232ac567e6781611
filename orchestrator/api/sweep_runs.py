"""`run` and `resume`: drive a sweep in this process, or in one of its own that outlives it."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.api.local_sweep import Sweep
from orchestrator.api.sweep_files import LoadedSweep, Source, as_yaml, loaded
from orchestrator.api.sweep_handle import Settings, as_overrides, raise_incomplete
from orchestrator.errors import ExitCode, OrchestrateError, SweepIncomplete
from orchestrator.folders import SweepFolder, existing_sweep, runs_folder

if TYPE_CHECKING:
    from orchestrator.execution.remote_cluster import ClusterAddress
    from orchestrator.execution.stop_reasons import StopReason


class NotInMainThread(OrchestrateError):
    """A sweep is driven by the main thread only, which gets Ctrl-C and the signals of a scheduler."""

    def __init__(self) -> None:
        super().__init__("a sweep is driven by the main thread only, which gets Ctrl-C: call it there, or detach=True")


def run(
    sweep: LoadedSweep | Source,
    *,
    resume_existing: bool = False,
    detach: bool = False,
    address: str | None = None,
    machines: int = 1,
    wait_for_gpus: bool = True,
    trust_remote_code: bool = False,
    show_progress: bool = True,
    check: bool = True,
    runs: Path | None = None,
) -> Sweep:
    """Run a new sweep to its end; Ctrl-C writes checkpoints and stops it.

    Args:
        sweep: the sweep, or its file; notices of a file are written to stderr.
        resume_existing: resume the sweep if it exists with this spec.
        detach: run it in a process of its own, also after this one ends, and return once that drives it.
        address: run on this existing Ray cluster (HOST:PORT, or auto); None for this machine.
        machines: with `address`: wait for this many machines.
        wait_for_gpus: wait where other sweeps have the GPUs; else GpusBusy is raised.
        trust_remote_code: whether Python code of the model's repository may run.
        show_progress: show the live table, or lines where stderr is no terminal.
        check: raise where the sweep did not end with every trial trained; without, `wait` returns the exit code.
        runs: the runs folder; default $ORCHESTRATE_HOME, or ./runs.

    Raises:
        SpecError, DataError, NameTaken, DoesNotFit, DiskTooSmall, ClusterError, GpusBusy: before the first trial.
        NoTrialCompleted, SweepIncomplete: with `check`; with `detach` where the driver ended at once.
        NotInMainThread: without `detach`, in another thread.
    """
    root = (runs or runs_folder()).resolve()
    read = loaded(sweep, root)
    for notice in read.notices if not isinstance(sweep, LoadedSweep) else ():
        sys.stderr.write(f"{notice}\n")
    name = read.spec.name
    cluster = _options_of_cluster(address, machines)
    if detach:
        options = ["sweep", *cluster, *(["--continue"] if resume_existing else []), *_file_options(read)]
        with _file(read) as file:
            _start_detached(SweepFolder(root, name), options, wait_for_gpus, trust_remote_code, str(file))
        return Sweep(existing_sweep(root, name))
    _check_main_thread()
    from orchestrator.api import driving
    from orchestrator.spec.estimates.arrangement import DoesNotFit

    try:
        reason = driving.start(
            read.spec,
            root,
            resume_existing=resume_existing,
            cluster_at=_cluster(address, machines),
            trust_remote_code=trust_remote_code,
            waits=wait_for_gpus,
            show_progress=show_progress,
        )
    except DoesNotFit as error:
        raise read.with_line(error) from None
    return _ended(SweepFolder(root, name), reason, check=check)


def resume(
    name: str,
    overrides: Settings = (),
    *,
    retry_failed: bool = False,
    mirror: str | None = None,
    detach: bool = False,
    address: str | None = None,
    machines: int = 1,
    wait_for_gpus: bool = True,
    trust_remote_code: bool = False,
    show_progress: bool = True,
    check: bool = True,
    runs: Path | None = None,
) -> Sweep:
    """Resume a sweep that was stopped or killed; trials for whose common bug it stopped are tried again.

    Args:
        name: the sweep.
        overrides: changes of settings that no result depends on, and wider lists and ranges of the search.
        retry_failed: try all failed trials again.
        mirror: URL from which the sweep is downloaded if this disk does not have it.
        detach: as for `run`, like the arguments after it.

    Raises:
        NoSuchSweep, SweepHeld, SpecChanged, SearchNarrowed, BudgetUsedUp, MirrorError: nothing was changed.
        NoTrialCompleted, SweepIncomplete, NotInMainThread: as for `run`.
    """
    root, changes = (runs or runs_folder()).resolve(), as_overrides(overrides)
    if mirror is None:
        existing_sweep(root, name)
    if detach:
        options = ["resume", *_options_of_cluster(address, machines), *(f"--set={one}" for one in changes)]
        options += [*(["--retry-failed"] if retry_failed else []), *([f"--mirror={mirror}"] if mirror else [])]
        _start_detached(SweepFolder(root, name), options, wait_for_gpus, trust_remote_code, name)
        return Sweep(existing_sweep(root, name))
    _check_main_thread()
    from orchestrator.api import driving

    reason = driving.resume(
        name,
        root,
        changes,
        mirror=mirror,
        cluster_at=_cluster(address, machines),
        trust_remote_code=trust_remote_code,
        retry_failed=retry_failed,
        waits=wait_for_gpus,
        show_progress=show_progress,
    )
    return _ended(existing_sweep(root, name), reason, check=check)


def _ended(folder: SweepFolder, reason: StopReason, *, check: bool) -> Sweep:
    """Return the sweep whose driver has ended. Raises NoTrialCompleted and SweepIncomplete, with `check`."""
    sweep = Sweep(folder)
    if check:
        from orchestrator.api.driving import code_of

        raise_incomplete(folder.name, code_of(folder, reason), str(reason))
    return sweep


def _check_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise NotInMainThread


def _cluster(address: str | None, machines: int) -> ClusterAddress | None:
    from orchestrator.execution.remote_cluster import ClusterAddress

    return None if address is None else ClusterAddress(address, machines)


def _options_of_cluster(address: str | None, machines: int) -> list[str]:
    return [] if address is None else [f"--address={address}", f"--machines={machines}"]


def _file_options(read: LoadedSweep) -> list[str]:
    options = [f"--set={one}" for one in read.overrides]
    return [*options, *([f"--name={read.name}"] if read.name else []), *(["--rehearse"] if read.is_rehearsal else [])]


@contextmanager
def _file(read: LoadedSweep) -> Generator[Path]:
    """Yield the sweep's file; of a mapping a temporary one, which its driver has read once it drives the sweep."""
    if read.source is not None:
        yield read.source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mapping.yaml")
        path.write_text(as_yaml(read.mapping or {}), encoding="utf-8")
        yield path


def _start_detached(
    folder: SweepFolder, options: Sequence[str], wait_for_gpus: bool, trust_remote_code: bool, argument: str
) -> None:
    """Start the driver as a process of its own. Raises SweepIncomplete with its output where it ended at once."""
    from orchestrator.commands.detached_driver import start_detached

    output: list[str] = []
    flags = [*([] if wait_for_gpus else ["--no-wait"]), *(["--trust-remote-code"] if trust_remote_code else [])]
    driver = start_detached(folder, [*options, *flags, "--", argument], output.append)
    if driver.code not in (None, ExitCode.DONE):
        raise SweepIncomplete(folder.name, ExitCode(driver.code), "".join(output).strip() or "its driver has no output")
