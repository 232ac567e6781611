"""Checkpoints held for trials that go on from them: made by any terminal, removed by the driver when nobody needs them.

A checkpoint is held before the study knows of the trial. Between the two the maker has the lock, so that the driver
does not take it for one that a killed terminal left behind.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.folders import SweepFolder
from orchestrator.study.reader import StudyReader
from trainer.failpoint import failpoint
from trainer.storage import manifest
from trainer.storage.lock import held


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
    return bool(manifest.places(folder.trial(number).glob("[0-9]*")))
