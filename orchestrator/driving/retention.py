"""What stays on the disk: the best trials' final weights, and no checkpoint of a finished trial."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.engine.copies import COPYING
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.ranking import ranking
from orchestrator.study.records import TrialRecord
from trainer.failpoint import failpoint


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
