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


def tidy(folder: SweepFolder, spec: SweepSpec, records: Sequence[TrialRecord]) -> None:
    """Remove checkpoints of finished trials, and weights of all but the best `spec.kept`."""
    kept = {record.number for record in ranking(records, *spec.goals)[: spec.kept]}
    for record in records:
        if not record.state.finished:
            continue
        for attempt in folder.trial(record.number).glob("[0-9]*"):
            _remove(attempt / "checkpoints")
            if record.number not in kept:
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
