"""`delete`: removes a sweep with its study, its files and its MLflow runs.

The folder is first renamed into `.deleted`, with a list of what is to do: from then on no command finds the sweep, and
its name is free. Runs, the study's rows in another database, and files follow. Where the process is killed in between,
the next `delete` of that name, or `clean`, does the rest: each step can be repeated.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.commands.runs_folder.sweep_list import summary
from orchestrator.errors import OrchestrateError, StorageRefused, SweepHeld
from orchestrator.folders import (
    RUNS_FILE,
    SWEEP_NAME_PATTERN,
    SweepFolder,
    disk_usage,
    existing_sweep,
    known_sweeps,
    sweep_lock,
)
from orchestrator.spec.estimates.disk_space import format_bytes
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.study_database import delete_study, has_own_database, hide_password, study_url
from orchestrator.study.study import Study
from orchestrator.tracking.deferred_messages import outbox_state
from orchestrator.tracking.run_removal import SweepRuns, delete_runs, find_runs
from orchestrator.tracking.tracking_store import sweep_tracking_uri
from trainer.results import clause
from trainer.storage.atomic_files import fsync, write_json
from trainer.storage.failpoints import failpoint

DELETED_SWEEPS = ".deleted"
"""In the runs folder: sweeps whose deletion has begun."""
DELETION_LIST = "deletion.json"
"""In the folder of such a sweep: MLflow's run ids that are to be deleted; null: they stay."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """What deleting a sweep removes, what it frees, and what else refers to the sweep."""

    folder: SweepFolder
    state: str
    trials: int
    disk: int
    runs: SweepRuns | None
    """None: MLflow's runs stay."""
    notices: tuple[str, ...]

    @property
    def frees(self) -> int:
        """Bytes on this machine."""
        return self.disk + (0 if self.runs is None else self.runs.bytes)

    def lines(self) -> list[str]:
        """Return what is removed, as text, one thing a line."""
        counted = f"{self.trials} trial{'' if self.trials == 1 else 's'} done"
        lines = [f"{self.folder.name} ({self.state}, {counted}): {self.folder.path}, {format_bytes(self.disk)}"]
        if self.runs is None:
            lines.append("its runs in MLflow stay")
        elif self.runs.ids:
            size = "" if self.runs.stays_restorable else f", {format_bytes(self.runs.bytes)} of artifacts"
            count = len(self.runs.ids)
            lines.append(f"{count} run{'' if count == 1 else 's'} in MLflow ({self.runs.store}{size})")
            if self.runs.stays_restorable:
                lines.append("  that server marks them as deleted; its `mlflow gc` frees their space")
        return [*lines, *self.notices, f"this frees {format_bytes(self.frees)} and cannot be undone"]


def plan_deletion(name: str, root: Path, *, keep_mlflow: bool = False) -> Deletion:
    """Return what `delete` would do; changes nothing.

    Raises:
        NoSuchSweep: with the nearest name.
        SweepHeld: a driver runs it; the message names the command that stops it.
        StorageRefused: MLflow's store cannot be read.
    """
    folder = existing_sweep(root, name)
    with sweep_lock(folder):
        pass
    found, sweep_id, spec = summary(folder), "", _spec(folder)
    if found["state"] != "unreadable" and Study.exists(folder):
        with Study.open(folder, read_only=True) as study:
            sweep_id = study.id
            if not has_own_database(folder) and not study.driver_has_ended():
                raise SweepHeld(name, "a driver on another machine")
    runs = None
    if not keep_mlflow:
        runs = SweepRuns((), "", 0, stays_restorable=False)
        if spec is not None:
            try:
                uri = sweep_tracking_uri(folder, spec.tracking.uri)
                runs = find_runs(root, uri, spec.tracking.experiment, sweep_id, _run_ids(folder))
            except StorageRefused as error:
                kept = "nothing was deleted; --keep-mlflow leaves its runs there"
                raise StorageRefused(f"{clause(error)}; {kept}") from error
    notices = [*_own_notices(folder, spec), *references(folder)]
    return Deletion(folder, found["state"], found.get("finished", 0), disk_usage(folder.path), runs, tuple(notices))


def delete_sweep(deletion: Deletion) -> None:
    """Delete the sweep as planned.

    Raises:
        SweepHeld: a driver has begun since.
    """
    folder = deletion.folder
    with sweep_lock(folder):
        move_to_deleted(folder, None if deletion.runs is None else list(deletion.runs.ids))
        finish_deletion(folder.root, folder.name)


def move_to_deleted(folder: SweepFolder, runs: list[str] | None) -> None:
    """Take the sweep's name away from it; `finish_deletion` does the rest. The caller holds the sweep's lock.

    `runs`: ids of the runs in MLflow to delete.
    """
    to = root_of_deleted(folder.root) / folder.name
    if to.exists():
        finish_deletion(folder.root, folder.name)
    write_json(folder.path / DELETION_LIST, {"runs": runs})
    if folder.log.is_file():
        folder.log.rename(folder.path / folder.log.name)
        with suppress(OSError):  # logs of other sweeps
            folder.log.parent.rmdir()
    to.parent.mkdir(exist_ok=True)
    failpoint("delete.listed")
    folder.path.rename(to)
    fsync(to.parent)
    fsync(folder.root)
    failpoint("delete.moved")


def root_of_deleted(root: Path) -> Path:
    """Return the folder of sweeps whose deletion has begun."""
    return root / DELETED_SWEEPS


def half_deleted(root: Path) -> list[str]:
    """Return the names of sweeps whose deletion was interrupted."""
    folder = root_of_deleted(root)
    return sorted(p.name for p in folder.iterdir() if SWEEP_NAME_PATTERN.fullmatch(p.name)) if folder.is_dir() else []


def finish_deletion(root: Path, name: str) -> int:
    """Do what is left of a deletion that has begun; return the bytes of its folder."""
    folder = SweepFolder(root, f"{DELETED_SWEEPS}/{name}")
    size, listed = disk_usage(folder.path), folder.path / DELETION_LIST
    if listed.is_file():
        todo: dict[str, Any] = json.loads(listed.read_text(encoding="utf-8"))
        if todo.get("runs") and (spec := _spec(folder)) is not None:
            delete_runs(root, sweep_tracking_uri(folder, spec.tracking.uri), todo["runs"])
        failpoint("delete.runs")
        if not has_own_database(folder):
            delete_study(study_url(folder), name)
        failpoint("delete.study")
        write_json(listed, {"runs": None})  # what is left is files
        pointer = folder.database.with_suffix(".url")
        for path in (pointer, *(p for p in folder.path.iterdir() if p not in (listed, pointer))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            failpoint("delete.files")
    shutil.rmtree(folder.path)
    if not any(folder.path.parent.iterdir()):
        folder.path.parent.rmdir()
    return size


def references(folder: SweepFolder) -> list[str]:
    """Return which other sweeps of the runs folder refer to this one, as sentences."""
    found: list[str] = []
    inside = f"{folder.path}/"
    for name in known_sweeps(folder.root):
        other = SweepFolder(folder.root, name)
        text = other.spec.read_text(encoding="utf-8", errors="replace")
        if name == folder.name or (inside not in text and "warm_start" not in text):
            continue
        spec = _spec(other)
        if spec is None:
            continue
        if spec.warm_start == folder.name:
            has_copy = Study.exists(other)
            found.append(
                f"{name} was warm started from it and has a copy of its trials: it stays whole"
                if has_copy
                else f"{name}, which has not begun, is to be warm started from it: it could not begin"
            )
        paths = sorted(p for p, value in _texts(spec.model_dump(mode="json")) if value.startswith(inside))
        if paths:
            found.append(f"{name} reads files of it ({', '.join(paths)}): it could not be resumed or exported")
    return found


def _own_notices(folder: SweepFolder, spec: SweepSpec | None) -> list[str]:
    found: list[str] = []
    if not has_own_database(folder):
        found.append(f"its study in {hide_password(study_url(folder))} is deleted too")
    if spec is not None and spec.mirror is not None:
        found.append(f"its copies at {spec.mirror}/{folder.name} stay")
    if spec is not None and spec.sft is not None:
        found.append("the SFT stage's model is in the cache, which other sweeps may share: `orchestrate clean`")
    state = outbox_state(folder.outbox)
    if state is not None and (waiting := state.pending + state.deferred):
        found.append(f"{waiting} messages that MLflow has not received yet are dropped")
    return found


def _spec(folder: SweepFolder) -> SweepSpec | None:
    """Return the sweep's spec; None where the file cannot be read, which must not keep it from being deleted."""
    try:
        return load_spec(folder.spec, is_new=False)
    except (OrchestrateError, FileNotFoundError):
        return None


def _run_ids(folder: SweepFolder) -> list[str]:
    path = folder.path / RUNS_FILE
    return list(json.loads(path.read_text(encoding="utf-8")).values()) if path.is_file() else []


def _texts(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(path, value)]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [text for key, inner in entries for text in _texts(inner, f"{path}.{key}" if path else str(key))]
