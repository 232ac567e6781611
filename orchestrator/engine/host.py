"""One process in which several trials take turns over one frozen model: a Ray actor, one call at a time."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import ray

from orchestrator.engine.attempt import Attempt, Hall, OpenWorkshop, Workshop
from orchestrator.engine.failures import DeviceFailed, WorkerLost
from orchestrator.engine.messages import Job, Report
from orchestrator.engine.rank import BESIDE
from orchestrator.engine.worker import empty, retired
from orchestrator.study.state import FailureKind


@dataclass(slots=True, eq=False)
class _Seat:
    """An attempt, and the workshop it has from its first turn on."""

    job: Job
    attempt: Attempt
    workshop: Workshop | None = None
    given_up: bool = False
    """Its workshop may be half interrupted; no other trial gets it."""


class Host:
    """Attempts by their job's id. Each has its own workshop; these share what was loaded and does not change."""

    def __init__(self, cache: Path, opened: OpenWorkshop) -> None:
        self._cache, self._open = cache, opened
        self._hall: Hall | None = None
        self._free: list[Workshop] = []
        self._seats: dict[str, _Seat] = {}
        self._leaving = threading.Lock()
        """Held while a seat is left or given up: whoever has its workshop next is not interrupted for it."""
        self._failed = ""
        """How a GPU failed under this process, which ends with the first trial that lets go of it."""

    def begin(self, job: Job) -> None:
        """Take this attempt in; nothing is computed yet. An older one at the same trial ends: nobody listens to it."""
        self._end_if_failed()
        for seat in [seat for seat in self._seats.values() if seat.job.run == job.run]:
            self.close(seat.job.id)
        self._seats[job.id] = _Seat(job, Attempt(job, lambda: self._workshop(job.id)))

    def pull(self, job_id: str) -> Report:
        """The attempt's turn: its next points. Neighbours wait, so that activations of one trial live at a time."""
        if job_id not in self._seats:
            raise WorkerLost("the process that it shares with other trials was started anew")
        if self._failed:
            raise DeviceFailed(self._failed)
        seat = self._seats[job_id]
        try:
            report = seat.attempt.pull()
        except DeviceFailed as why:
            self._failed = f"a GPU failed under the process that it shares with other trials: {why}"
            raise DeviceFailed(self._failed) from None
        if report.end is not None and report.end.failure is FailureKind.OUT_OF_MEMORY:
            seat.workshop, seat.given_up = None, True  # with whatever was left half made; the base stays
            empty()
        return retired(report)

    def close(self, job_id: str) -> None:
        """This attempt is over, whatever became of it; its workshop is free for another."""
        self._end_if_failed()
        with self._leaving:
            seat = self._seats.pop(job_id, None)
        if seat is None:
            return
        seat.attempt.close()
        if seat.workshop is not None and not seat.given_up:
            self._free.append(seat.workshop)

    @ray.method(concurrency_group=BESIDE)
    def give_up(self, job_id: str) -> None:
        """Whoever pulled this attempt is gone: have its turn end soon, before `close` comes to it."""
        with self._leaving:
            seat = self._seats.get(job_id)
            if seat is not None and seat.workshop is not None:
                seat.given_up = True
                seat.workshop.interrupt()

    def _end_if_failed(self) -> None:
        """Ray starts the process anew; what its other trials ask of it next tells them that they lost it."""
        if self._failed:
            os._exit(1)

    def _workshop(self, job_id: str) -> Workshop:
        seat = self._seats[job_id]
        if seat.workshop is None:
            if self._hall is None:
                self._hall = cast("Hall", self._open(self._cache))
            seat.workshop = self._free.pop() if self._free else self._hall.beside()
        return seat.workshop
