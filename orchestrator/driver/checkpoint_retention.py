"""Retention of weights and checkpoints: keeps the best trials' final weights, no checkpoint of a finished trial.

Checkpoints from which clones start (forks) are pinned by the command that enqueues the clone and removed by the driver
once no trial needs them. The command pins the checkpoint before it stores the clone in the study; meanwhile the command
holds fork_lock, so that the driver does not remove it as unused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.execution.workers.mirror_upload import UPLOADING
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.repeats import group_by_configuration, is_decided, merge_record, rank_configurations
from orchestrator.study.trial_records import TrialRecord
from trainer.storage import checkpoint_manifest
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock


class CheckpointRetention:
    """Removes checkpoints and weights that are no longer needed, at the start and after each trial."""

    def __init__(
        self,
        folder: SweepFolder,
        spec: SweepSpec,
        records: Sequence[TrialRecord],
        on_removed: Callable[[TrialRecord, bool], None] | None = None,
    ) -> None:
        """`on_removed`: called with each ended trial whose checkpoints were removed, and whether its weights were."""
        self._folder, self._spec, self._on_removed = folder, spec, on_removed
        self._records = {record.number: record for record in records}
        self._kept = self._to_keep()
        for record in records:
            if record.state.is_final:
                self._clear(record, model=record.number not in self._kept)

    def on_trial_end(self, record: TrialRecord) -> None:
        """Remove an ended trial's checkpoints, and the final weights of trials no longer among the best."""
        before = self._kept - {record.number}
        self._records[record.number] = record
        self._kept = self._to_keep()
        for number in sorted((before | {record.number}) - self._kept):
            self._clear(self._records[number], model=True)
            self._notify(self._records[number], model=True)
        self._clear(record, model=False)
        if record.number in self._kept:
            self._notify(record, model=False)

    def _notify(self, record: TrialRecord, *, model: bool) -> None:
        if self._on_removed is not None:
            self._on_removed(record, model)

    def _to_keep(self) -> set[int]:
        return {record.number for record in models_to_keep(self._spec, list(self._records.values()))}

    def _clear(self, record: TrialRecord, *, model: bool) -> None:
        for attempt in self._folder.trial(record.number).glob("[0-9]*"):
            _remove(attempt / "checkpoints")
            shutil.rmtree(
                attempt / UPLOADING, ignore_errors=True
            )  # a worker may write or remove files at the same time
            if model:
                _remove(attempt / "model")


def models_to_keep(spec: SweepSpec, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials whose final weights are kept: of the best configurations, best first, the best seed each.

    A configuration that waits for more seeds keeps its best so far: its mean may become the best.
    """
    ranked = rank_configurations(records, spec)
    has_groups = spec.seeds_per_configuration > 1 or any(record.finalist_of is not None for record in records)
    groups = group_by_configuration(records, spec.search) if has_groups else ()
    waiting = [
        merge_record(group, spec)
        for group in groups
        if (spec.seeds_per_configuration > 1 or group[0].finalist_of is not None) and not is_decided(group, spec)
    ]
    numbers, known = {record.number for record in waiting}, {record.number for record in ranked}
    kept = [record for k, record in enumerate(ranked) if k < spec.models_kept or record.number in numbers]
    early = [record for record in waiting if record.finalist_of is not None and record.number not in known]
    return [*kept, *early]


def model_folder(folder: SweepFolder, record: TrialRecord) -> Path | None:
    """Return the folder of a trial's final weights; None where they were removed."""
    for attempt in range(record.attempts, 0, -1):
        model = folder.attempt(record.number, attempt) / "model"
        if model.is_dir():
            return model
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        failpoint("retention.remove")
        shutil.rmtree(path)


def fork_lock(folder: SweepFolder) -> FileLock:
    """Return the lock under which forks are created and removed."""
    return FileLock(folder.path / "forks.lock")


def remove_unused_forks(folder: SweepFolder, study: StudyReader) -> None:
    """Remove forks whose trial has a checkpoint of its own or has ended, and forks without an enqueued trial."""
    if not folder.forks.is_dir():
        return
    lock = fork_lock(folder)
    if not lock.acquire(timeout=0):
        return  # a command creates a fork now; the next call removes unused ones
    try:
        used = _used_forks(folder, study)
        for path in folder.forks.iterdir():
            if path.name not in used:
                failpoint("fork.remove")
                shutil.rmtree(path)
    finally:
        lock.release()


def _used_forks(folder: SweepFolder, study: StudyReader) -> set[str]:
    records = {record.number: record for record in study.trials()}
    found: set[str] = set()
    for enqueued in study.enqueued_trials():
        if enqueued.fork is None:
            continue
        record = None if enqueued.trial is None else records.get(enqueued.trial)
        if record is not None and (record.state.is_final or _has_own_checkpoint(folder, record.number)):
            continue
        found.add(enqueued.fork.folder_name)
    return found


def _has_own_checkpoint(folder: SweepFolder, number: int) -> bool:
    return bool(checkpoint_manifest.list_checkpoints(folder.trial(number).glob("[0-9]*")))
