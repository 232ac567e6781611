"""Which weights and checkpoints stay on disk: the best trials' final weights, and no checkpoint of a finished trial.

Checkpoints from which other trials continue (forks) are pinned by any terminal and removed by the driver once no trial
needs them. A checkpoint is pinned before the study has the trial; in between the terminal holds a lock, so that the
driver does not take the checkpoint for the remains of a killed terminal.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.execution.workers.mirror_upload import UPLOADING
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import TrialRecord, rank_trials
from trainer.storage import checkpoint_manifest
from trainer.storage.atomic_files import FileLock, failpoint


class CheckpointRetention:
    """Keeps the disk tidy: everything once at the start, then what each trial's end changes."""

    def __init__(
        self,
        folder: SweepFolder,
        spec: SweepSpec,
        records: Sequence[TrialRecord],
        on_removed: Callable[[TrialRecord, bool], None] | None = None,
    ) -> None:
        """`on_removed` is told of each ended trial whose checkpoints went, and whether its final weights did."""
        self._folder, self._spec, self._on_removed = folder, spec, on_removed
        self._best = self._ranked(records)
        for record in records:
            if record.state.finished:
                self._clear(record, model=record not in self._best)

    def on_trial_end(self, record: TrialRecord) -> None:
        """A trial ended: its checkpoints go, and the final weights of whoever is no longer among the best."""
        before = [best for best in self._best if best.number != record.number]
        self._best = self._ranked([*before, record])
        for other in (*before, record):
            if other not in self._best:
                self._clear(other, model=True)
                self._notify(other, model=True)
        self._clear(record, model=False)
        if record in self._best:
            self._notify(record, model=False)

    def _notify(self, record: TrialRecord, *, model: bool) -> None:
        if self._on_removed is not None:
            self._on_removed(record, model)

    def _ranked(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        return models_to_keep(self._spec, records)

    def _clear(self, record: TrialRecord, *, model: bool) -> None:
        for attempt in self._folder.trial(record.number).glob("[0-9]*"):
            _remove(attempt / "checkpoints")
            shutil.rmtree(
                attempt / UPLOADING, ignore_errors=True
            )  # a worker may just put something there or take it away
            if model:
                _remove(attempt / "model")


def models_to_keep(spec: SweepSpec, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials whose final weights stay."""
    return rank_trials(records, *spec.objectives)[: spec.models_kept]


def model_folder(folder: SweepFolder, record: TrialRecord) -> Path | None:
    """The final weights of a trial, from the attempt that finished; None when they were not kept."""
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
    """While entered, what is held and not yet in the study is left alone."""
    return FileLock(folder.path / "forks.lock")


def remove_unused_forks(folder: SweepFolder, study: StudyReader) -> None:
    """Let go of checkpoints whose trial has one of its own or has ended, and of those that no trial was made of."""
    if not folder.forks.is_dir():
        return
    lock = fork_lock(folder)
    if not lock.acquire(timeout=0):
        return  # somebody makes one just now: next time
    try:
        needed = _needed(folder, study)
        for path in folder.forks.iterdir():
            if path.name not in needed:
                failpoint("fork.remove")
                shutil.rmtree(path)
    finally:
        lock.release()


def _needed(folder: SweepFolder, study: StudyReader) -> set[str]:
    records = {record.number: record for record in study.trials()}
    found: set[str] = set()
    for enqueued in study.enqueued_trials():
        if enqueued.fork is None:
            continue
        record = None if enqueued.trial is None else records.get(enqueued.trial)
        if record is not None and (record.state.finished or _has_own_checkpoint(folder, record.number)):
            continue
        found.add(enqueued.fork.place)
    return found


def _has_own_checkpoint(folder: SweepFolder, number: int) -> bool:
    return bool(checkpoint_manifest.list_checkpoints(folder.trial(number).glob("[0-9]*")))
