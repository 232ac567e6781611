"""Data of `list`, and of `status` without a name: one summary per sweep, from its study and its folder.

A sweep costs the same number of queries however many trials it has, and none as long as its files have not changed:
summaries of sweeps that no driver runs are kept in `cache/list.json`, each with the times and sizes of the files that
it was read from.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.commands.runs_folder.archive_records import ArchivedSweep, archived_sweeps
from orchestrator.commands.status import json_number, sweep_state
from orchestrator.errors import OrchestrateError, first_line
from orchestrator.folders import SweepFolder, disk_usage, known_sweeps, lock_holder
from orchestrator.spec.estimates.sweep_plan import planned_trials
from orchestrator.spec.loading.loader import load_spec
from orchestrator.study.database.study_database import has_own_database
from orchestrator.study.repeats import front_of_configurations
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord
from trainer.storage.atomic_files import write_json

_KEPT = "list.json"
_VERSION = f"{version('prefsweep')}, 2"
"""Summaries of another version are read anew; the number counts their formats within a version."""
_TIME_RESOLUTION = 0.1
"""Seconds. File systems date a write by the last tick of the kernel's clock."""
UNREADABLE, ARCHIVED, PREPARING, INTERRUPTED = "unreadable", "archived", "preparing", "interrupted"


def list_sweeps(root: Path, *, with_disk: bool = False) -> dict[str, Any]:
    """Return the sweeps of the runs folder as printed by `list --json`, the newest first.

    Of each: `name`, `state` (unreadable, with the reason in `why`, where its study cannot be opened), `finished` and
    `planned` trials (None if only time limits it), `states` (trials by state), the best trial, when it began in seconds
    since 1970.

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


class SweepSummaries:
    """The summaries of a runs folder's sweeps; each is read again only after its files changed. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._kept: dict[str, dict[str, Any]] | None = None
        """As in the file: summaries of sweeps that no driver runs."""
        self._running: dict[str, tuple[Any, dict[str, Any]]] = {}
        """By sweep: what its summary was read from while a driver runs it, and the summary."""

    def read(self) -> list[dict[str, Any]]:
        """Return one summary per sweep, by name."""
        with self._guard:
            kept = _kept(self._root) if self._kept is None else self._kept
            now, running = dict[str, dict[str, Any]](), dict[str, tuple[Any, dict[str, Any]]]()
            found = [self._read(SweepFolder(self._root, name), kept, now, running) for name in known_sweeps(self._root)]
            if now != kept:
                _keep(self._root, now)
            self._kept, self._running = now, running
            return found

    def _read(
        self,
        folder: SweepFolder,
        kept: dict[str, dict[str, Any]],
        now: dict[str, dict[str, Any]],
        running: dict[str, tuple[Any, dict[str, Any]]],
    ) -> dict[str, Any]:
        name, looked, holder = folder.name, time.time(), lock_holder(folder)
        stamp = file_stamp(folder)
        if stamp is None:
            return summary(folder)
        if holder is None:
            before = kept.get(name, {})
            found = before["summary"] if before.get("stamp") == stamp else summary(folder)
            if found["state"] != UNREADABLE:
                now[name] = {"stamp": stamp, "summary": found}
            return found
        # The driver's next write may come within the resolution of the files' times.
        is_certain = max(times[0] for times in stamp) < (looked - _TIME_RESOLUTION) * 1e9
        seen = self._running.get(name)
        found = seen[1] if seen is not None and seen[0] == (stamp, holder) else summary(folder)
        if is_certain and found["state"] != UNREADABLE:
            running[name] = ((stamp, holder), found)
        return found


def file_stamp(folder: SweepFolder) -> list[list[int]] | None:
    """Return times, sizes and inodes of the files of a sweep's summary; None where they cannot tell a change.

    That is before there is a study, and where the study is in another database.
    """
    if not has_own_database(folder):
        return None
    database = os.fspath(folder.database)  # text, as a list of 1,000 sweeps looks at several thousand files
    if not os.path.isfile(database):  # noqa: PTH113
        return None
    found: list[list[int]] = []
    for path in (os.fspath(folder.spec), database, f"{database}-wal"):
        with suppress(FileNotFoundError):
            state = os.stat(path)  # noqa: PTH116
            found.append([state.st_mtime_ns, state.st_size, state.st_ino])
    return found


def _kept(root: Path) -> dict[str, dict[str, Any]]:
    path = SweepFolder(root, "").cache / _KEPT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # no list yet, or a damaged one: every study is read
        return {}
    return content["sweeps"] if isinstance(content, dict) and content.get("version") == _VERSION else {}


def _keep(root: Path, sweeps: dict[str, dict[str, Any]]) -> None:
    path = SweepFolder(root, "").cache / _KEPT
    if os.access(root, os.W_OK) and (not path.parent.exists() or os.access(path.parent, os.W_OK)):
        with suppress(OSError):  # on a full disk the studies are read again
            write_json(path, {"version": _VERSION, "sweeps": sweeps})


def summary(folder: SweepFolder) -> dict[str, Any]:
    """Return one sweep's entry of the list, without its disk."""
    try:
        return _summary(folder)
    except OrchestrateError as error:
        began = folder.spec.stat().st_mtime
        return {"name": folder.name, "state": UNREADABLE, "why": first_line(error), "began": began}


def _summary(folder: SweepFolder) -> dict[str, Any]:
    trials, enqueued = list[TrialRecord](), 0
    if not Study.exists(folder):
        spec = load_spec(folder.spec, is_new=False)
        state = PREPARING if lock_holder(folder) else INTERRUPTED
        began = folder.spec.stat().st_mtime
    else:
        with Study.open(folder, read_only=True) as study, study.at_one_moment():
            spec, state, trials = study.spec, sweep_state(study), study.trials()
            enqueued, began = sum(each.by_command for each in study.enqueued_trials()), study.spec_history()[0].at
    front, planned = front_of_configurations(trials, spec), planned_trials(spec)
    return {
        "name": spec.name,
        "state": state,
        "why": "",
        "finished": sum(trial.state.is_final for trial in trials),
        "states": dict(sorted(Counter(trial.state.value for trial in trials).items())),
        "planned": None if planned is None else max(planned + enqueued, len(trials)),
        "goal": {"metric": spec.first_objective.metric, "direction": spec.first_objective.direction},
        "best": None if not front else {"trial": front[0].number, "value": json_number(front[0].value)},
        "began": began,
    }
