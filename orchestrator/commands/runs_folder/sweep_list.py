"""Data of `list`, and of `status` without a name: one summary per sweep, from its study and its folder.

A sweep costs the same number of queries however many trials it has, and none as long as its files have not changed. Of
one whose files have changed it is asked first whether more than metrics was written, and of all sweeps whose studies
are in one database on a server with one query. Summaries of sweeps that no driver runs are kept in `cache/list.json`,
each with what tells whether it still holds.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.commands.runs_folder.archive_records import ArchivedSweep, archived_sweeps
from orchestrator.commands.status import json_number, sweep_state
from orchestrator.errors import OrchestrateError, first_line
from orchestrator.folders import SWEEP_NAME_PATTERN, SweepFolder, disk_usage, lock_holder
from orchestrator.spec.estimates.sweep_plan import planned_trials
from orchestrator.spec.loading.loader import load_spec
from orchestrator.study.database.study_database import has_own_database, last_changes, study_url
from orchestrator.study.repeats import front_of_configurations
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.storage.atomic_files import write_json

_KEPT = "list.json"
_VERSION = f"{version('prefsweep')}, 4"
"""Summaries of another version are read anew; the number counts their formats within a version."""
_TIME_RESOLUTION = 0.1
"""Seconds. File systems date a write by the last tick of the kernel's clock."""
UNREADABLE, ARCHIVED, PREPARING, INTERRUPTED = "unreadable", "archived", "preparing", "interrupted"


def list_sweeps(root: Path, *, with_disk: bool = False) -> dict[str, Any]:
    """Return the sweeps of the runs folder as printed by `list --json`, the newest first.

    Of each: `name`, `state`, `why` (of an unreadable one why its study cannot be opened; of an interrupted one why its
    driver ended, "" where it died), `finished` and `planned` trials (None if only time limits it), `states` (trials by
    state), the best trial, when it began in seconds since 1970.

    `with_disk`: also `disk`, the bytes of its folder, and the archived sweeps, whose `why` says where they are; beside
    the sweeps `cache`, the bytes of what they share.
    """
    found = SweepSummaries(root).read()
    if with_disk:
        here = {sweep["name"] for sweep in found}
        found = [sweep | {"disk": disk_usage(SweepFolder(root, sweep["name"]).path)} for sweep in found]
        found += archived_entries(root, here)
    listed = {"runs_folder": str(root), "sweeps": sorted(found, key=lambda sweep: sweep["began"], reverse=True)}
    return listed | ({"cache": disk_usage(SweepFolder(root, "").cache)} if with_disk else {})


def archived_entries(root: Path, here: Collection[str]) -> list[dict[str, Any]]:
    """Return the list's entries of archived sweeps, without those of the names `here`.

    Of these the removal was interrupted, or the name is used again.
    """
    return [
        {
            "name": record.name,
            "state": ARCHIVED,
            "why": archived_text(record),
            "began": record.began,
            "disk": 0,
        }
        for record in archived_sweeps(root)
        if record.name not in here
    ]


def archived_text(record: ArchivedSweep) -> str:
    """Return where an archived sweep is, and how it comes back."""
    return f"at {record.url}; `orchestrate unarchive {record.name}` brings it back"


@dataclass(frozen=True, slots=True, eq=False)
class SweepRow:
    """A sweep's summary, and what it was read from."""

    name: str
    summary: dict[str, Any]
    """The same object as long as nothing has changed."""
    stamp: Any
    """As JSON: states of the sweep's files, and where its study is in another database, its `last_changes`."""
    is_certain: bool
    """Whether an equal stamp says that nothing has changed: a write may come within the resolution of files' times."""
    change: Any
    """`last_changes` of the study; None before there is one."""
    holder: str | None
    """Of the driver's lock."""


class SweepSummaries:
    """The summaries of a runs folder's sweeps; each is read again only after its study changed. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._rows: dict[str, SweepRow] | None = None
        self._files: dict[str, _SweepFiles] = {}
        self._changes: dict[str, Any] = {}
        """By the URL of another database: its `last_changes`, or why it cannot be read; of one reading of the list."""

    def read(self) -> list[dict[str, Any]]:
        """Return one summary per sweep, by name."""
        return [row.summary for row in self.rows()]

    def rows(self) -> list[SweepRow]:
        """Return one row per sweep, by name; the same objects where nothing has changed."""
        with self._guard:
            before = _kept(self._root) if self._rows is None else self._rows
            names = os.listdir(self._root) if self._root.is_dir() else []  # noqa: PTH208 - names only
            known, self._changes = self._files, {}
            self._files = {
                name: known.get(name) or _SweepFiles(self._root, name)
                for name in sorted(names)
                if SWEEP_NAME_PATTERN.fullmatch(name)
            }
            rows = (self._row(files, before.get(files.name)) for files in self._files.values())
            self._rows = {row.name: row for row in rows if row is not None}
            if (now := _to_keep(self._rows)) != _to_keep(before):
                _keep(self._root, now)
            return list(self._rows.values())

    def _row(self, files: _SweepFiles, before: SweepRow | None) -> SweepRow | None:
        """Return a sweep's row, `before` where nothing has changed; None of a folder that is no sweep's."""
        looked, rest = time.time(), files.at_rest()
        if rest is None:
            return None
        if files.resting is not None and files.resting[0] == rest:
            return files.resting[1]
        files.resting, spec = None, _state(files.spec)
        if spec is None:
            return None
        if before is not None and before.summary["state"] == UNREADABLE:
            before = None
        holder, own, url = files.holder(), [], files.other_database()
        if url is None:
            own = [state for path in (files.database, files.log) if (state := _state(path)) is not None]
            stamp: list[Any] = [spec, *own]
        else:
            changes = self._changes_of(url)
            if isinstance(changes, OrchestrateError):
                return SweepRow(files.name, _unreadable(files.folder, changes), None, False, None, holder)
            stamp = [spec, url, changes.get(files.name)]
        is_certain = max(state[0] for state in (spec, *own)) < (looked - _TIME_RESOLUTION) * 1e9
        if before is not None and before.holder == holder and before.is_certain and before.stamp == stamp:
            if holder is None and len(own) == 1 and files.tells_changes(rest, looked):
                files.resting = (rest, before)
            return before
        change = _change_of(files.folder) if own else stamp[-1] if url else None
        if before is not None and before.holder == holder and change is not None and before.change == change:
            return replace(before, stamp=stamp, is_certain=is_certain)  # metrics, heartbeats and requests were written
        return SweepRow(files.name, summary(files.folder), stamp, is_certain, change, holder)

    def _changes_of(self, url: str) -> dict[str, Any] | OrchestrateError:
        if url not in self._changes:
            try:
                self._changes[url] = last_changes(url)
            except OrchestrateError as error:
                self._changes[url] = error
        return self._changes[url]


class _SweepFiles:
    """The files that tell whether a sweep has changed; as text, as a list of 1,000 sweeps looks at several thousand."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder = name, SweepFolder(root, name)
        self.spec, self.database = os.fspath(self.folder.spec), os.fspath(self.folder.database)
        self.log = f"{self.database}-wal"
        self._path, self._lock = os.fspath(self.folder.path), os.fspath(self.folder.lock)
        self._pointer = os.fspath(self.folder.database.with_suffix(".url"))
        self._free: list[int] | None = None
        """State of the lock's file when no driver had the lock. One that takes it writes its name into the file."""
        self._url: tuple[list[int], str] | None = None
        self.resting: tuple[Any, SweepRow] | None = None
        """`at_rest` and the row of a sweep that no driver runs and whose database has no write-ahead log.

        Any process that writes to the database creates its log, and a driver takes the lock: both change `at_rest`.
        """

    def at_rest(self) -> list[Any] | None:
        """Return the states of the sweep's folder, its database and its lock; None if there is no folder."""
        try:
            folder = os.stat(self._path)  # noqa: PTH116
        except OSError:  # deleted meanwhile, or a link that leads nowhere
            return None
        return [(folder.st_mtime_ns, folder.st_ino), _state(self.database), _state(self._lock)]

    def tells_changes(self, rest: list[Any], looked: float) -> bool:
        """Return whether a change after the look at this time will be seen in `at_rest`."""
        return rest[0][0] < (looked - _TIME_RESOLUTION) * 1e9 and rest[2] in (None, self._free)

    def holder(self) -> str | None:
        """Return the driver's process, as `lock_holder`."""
        looked, state = time.time(), _state(self._lock)
        if state is None or state == self._free:
            return None
        holder = lock_holder(self.folder)
        is_certain = state[0] < (looked - _TIME_RESOLUTION) * 1e9
        self._free = state if holder is None and is_certain else None
        return holder

    def other_database(self) -> str | None:
        """Return the URL of the study; None where it is in the sweep's folder."""
        state = _state(self._pointer)
        if state is None:
            return None
        if self._url is None or self._url[0] != state:
            self._url = (state, study_url(self.folder))
        return self._url[1]


def _state(path: str) -> list[int] | None:
    """Return time, size and inode of a file; None where there is none."""
    try:
        state = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [state.st_mtime_ns, state.st_size, state.st_ino] if stat.S_ISREG(state.st_mode) else None


def _change_of(folder: SweepFolder) -> Any:
    try:
        return last_changes(study_url(folder)).get(folder.name)
    except OrchestrateError:  # the summary says why
        return None


def file_stamp(folder: SweepFolder) -> list[list[int]] | None:
    """Return times, sizes and inodes of the files of a sweep's study; None where they cannot tell a change.

    That is before there is a study, and where the study is in another database.
    """
    database = os.fspath(folder.database)
    if not has_own_database(folder) or _state(database) is None:
        return None
    states = (_state(path) for path in (os.fspath(folder.spec), database, f"{database}-wal"))
    return [state for state in states if state is not None]


def _to_keep(rows: dict[str, SweepRow]) -> dict[str, SweepRow]:
    return {name: row for name, row in rows.items() if row.holder is None and row.summary["state"] != UNREADABLE}


def _kept(root: Path) -> dict[str, SweepRow]:
    path = SweepFolder(root, "").cache / _KEPT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # no list yet, or a damaged one: every study is read
        return {}
    found = content["sweeps"] if isinstance(content, dict) and content.get("version") == _VERSION else {}
    return {
        name: SweepRow(name, each["summary"], each["stamp"], each["stamp"] is not None, each["change"], None)
        for name, each in found.items()
    }


def _keep(root: Path, rows: dict[str, SweepRow]) -> None:
    path = SweepFolder(root, "").cache / _KEPT
    sweeps = {
        name: {"stamp": row.stamp if row.is_certain else None, "change": row.change, "summary": row.summary}
        for name, row in rows.items()
    }
    if os.access(root, os.W_OK) and (not path.parent.exists() or os.access(path.parent, os.W_OK)):
        with suppress(OSError):  # on a full disk the studies are read again
            write_json(path, {"version": _VERSION, "sweeps": sweeps})


def summary(folder: SweepFolder) -> dict[str, Any]:
    """Return one sweep's entry of the list, without its disk."""
    try:
        return _summary(folder)
    except OrchestrateError as error:
        return _unreadable(folder, error)


def _unreadable(folder: SweepFolder, error: OrchestrateError) -> dict[str, Any]:
    began = folder.spec.stat().st_mtime
    return {"name": folder.name, "state": UNREADABLE, "why": first_line(error), "began": began}


def _summary(folder: SweepFolder) -> dict[str, Any]:
    trials, enqueued, why = list[TrialRecord](), 0, ""
    if not Study.exists(folder):
        spec = load_spec(folder.spec, is_new=False)
        state = PREPARING if lock_holder(folder) else INTERRUPTED
        began = folder.spec.stat().st_mtime
    else:
        with Study.open(folder, read_only=True) as study, study.at_one_moment():
            spec, state, trials = study.spec, sweep_state(study), study.trials()
            why = first_line(reason) if state == INTERRUPTED and (reason := study.stop_reason()) else ""
            enqueued, began = sum(each.by_command for each in study.enqueued_trials()), study.spec_history()[0].at
    front, planned = front_of_configurations(trials, spec), planned_trials(spec)
    return {
        "name": spec.name,
        "state": state,
        "why": why,
        "finished": sum(trial.state.is_final for trial in trials),
        "states": dict(sorted(Counter(trial.state.value for trial in trials).items())),
        "planned": None if planned is None else max(planned + enqueued, len(trials)),
        "goal": {"metric": spec.first_objective.metric, "direction": spec.first_objective.direction},
        "best": None if not front else {"trial": front[0].number, "value": json_number(front[0].value)},
        "began": began,
    }
