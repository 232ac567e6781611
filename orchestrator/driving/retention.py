"""What stays on the disk: the best trials' final weights, and no checkpoint of a finished trial."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.ranking import ranking
from orchestrator.study.records import TrialRecord
from trainer.failpoint import failpoint


class Retention:
    """Keeps the disk tidy: everything once at the start, then what each trial's end changes."""

    def __init__(self, folder: SweepFolder, spec: SweepSpec, records: Sequence[TrialRecord]) -> None:
        self._folder, self._spec = folder, spec
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
        self._clear(record, model=False)

    def _ranked(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        return ranking(records, *self._spec.goals)[: self._spec.kept]

    def _clear(self, record: TrialRecord, *, model: bool) -> None:
        for attempt in self._folder.trial(record.number).glob("[0-9]*"):
            _remove(attempt / "checkpoints")
            if model:
                _remove(attempt / "model")


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
