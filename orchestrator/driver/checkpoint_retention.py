"""What stays on the disk: the best trials' final weights, and no checkpoint of a finished trial.

Checkpoints held for trials that go on from them: made by any terminal, removed by the driver when nobody needs them.

A checkpoint is held before the study knows of the trial. Between the two the maker has the lock, so that the driver
does not take it for one that a killed terminal left behind.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.execution.workers.mirror_upload import COPYING
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import TrialRecord, ranking
from trainer.storage import checkpoint_manifest
from trainer.storage.atomic_files import failpoint, held


class Retention:
    """Keeps the disk tidy: everything once at the start, then what each trial's end changes."""

    def __init__(
        self,
        folder: SweepFolder,
        spec: SweepSpec,
        records: Sequence[TrialRecord],
        removed: Callable[[TrialRecord, bool], None] | None = None,
    ) -> None:
        """`removed` is told of each ended trial whose checkpoints went, and whether its final weights did."""
        self._folder, self._spec, self._removed = folder, spec, removed
        self._best = self._ranked(records)
        for record in records:
            if record.state.finished:
                self._clear(record, model=record not in self._best)

    def closed(self, record: TrialRecord) -> None:
        """A trial ended: its checkpoints go, and the final weights of whoever is no longer among the best."""
        before = [best for best in self._best if best.number != record.number]
        self._best = self._ranked([*before, record])
        for other in (*before, record):
            if other not in self._best:
                self._clear(other, model=True)
                self._tell(other, model=True)
        self._clear(record, model=False)
        if record in self._best:
            self._tell(record, model=False)

    def _tell(self, record: TrialRecord, *, model: bool) -> None:
        if self._removed is not None:
            self._removed(record, model)

    def _ranked(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        return best_of(self._spec, records)

    def _clear(self, record: TrialRecord, *, model: bool) -> None:
        for attempt in self._folder.trial(record.number).glob("[0-9]*"):
            _remove(attempt / "checkpoints")
            shutil.rmtree(
                attempt / COPYING, ignore_errors=True
            )  # a worker may just put something there or take it away
            if model:
                _remove(attempt / "model")


def best_of(spec: SweepSpec, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials whose final weights stay."""
    return ranking(records, *spec.goals)[: spec.kept]


def model_of(folder: SweepFolder, record: TrialRecord) -> Path | None:
    """The final weights of a trial, from the attempt that finished; None when they were not kept."""
    for attempt in range(record.attempts, 0, -1):
        model = folder.attempt(record.number, attempt) / "model"
        if model.is_dir():
            return model
    return None


def _remove(place: Path) -> None:
    if place.is_dir():
        failpoint("retention.remove")
        shutil.rmtree(place)


def _lock(folder: SweepFolder) -> Path:
    return folder.path / "forks.lock"


@contextmanager
def making(folder: SweepFolder) -> Generator[None]:
    """While entered, what is held and not yet in the study is left alone."""
    with held(_lock(folder)):
        yield


def tidy_forks(folder: SweepFolder, study: StudyReader) -> None:
    """Let go of checkpoints whose trial has one of its own or has ended, and of those that no trial was made of."""
    if not folder.forks.is_dir():
        return
    with _lock(folder).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody makes one just now: next time
            return
        needed = _needed(folder, study)
        for place in folder.forks.iterdir():
            if place.name not in needed:
                failpoint("fork.remove")
                shutil.rmtree(place)


def _needed(folder: SweepFolder, study: StudyReader) -> set[str]:
    records = {record.number: record for record in study.trials()}
    found: set[str] = set()
    for given in study.given():
        if given.fork is None:
            continue
        record = None if given.trial is None else records.get(given.trial)
        if record is not None and (record.state.finished or _has_own(folder, record.number)):
            continue
        found.add(given.fork.place)
    return found


def _has_own(folder: SweepFolder, number: int) -> bool:
    return bool(checkpoint_manifest.places(folder.trial(number).glob("[0-9]*")))
