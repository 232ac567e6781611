"""One process in which several trials take turns over one frozen model: a Ray actor, one call at a time.

The driver's side of processes that trials share: which trial is in which, and Tune's worker for such a trial.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError
from ray.tune import Trainable

from orchestrator.execution.local_cluster import RayDied, Slots, check_ray
from orchestrator.execution.messages import REPORT, DeviceFailed, Job, Report, WorkerLost
from orchestrator.execution.workers.attempt_runner import Attempt, Hall, OpenWorkshop, Workshop
from orchestrator.execution.workers.rank_actor import BESIDE
from orchestrator.execution.workers.trial_worker import empty, retired
from orchestrator.redaction import redact
from orchestrator.study.trial_records import FailureKind


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


_RESTART_SECONDS = 120.0
"""For a process that died to be there again."""
_POLL_SECONDS = 0.2


class Hosts:
    """As many processes as the slots need, each started at its first trial and again by Ray where it dies."""

    def __init__(self, slots: Slots, cache: Path, opened: OpenWorkshop) -> None:
        self._slots, self._given = slots, (cache, opened)
        self._hosts: list[Any] = []
        self._retired: list[Any] = []
        """Processes that get no more trials; each is ended once its last one has left it."""
        self._places: dict[str, Any] = {}

    @property
    def trainable(self) -> type[Trainable]:
        """What Tune runs for each trial."""
        return Relay

    def config(self, job: Job) -> dict[str, Any]:
        """The trial's, with the process that has the fewest trials.

        A process in place of a retired one waits, and its trials with it, until that one has given back its GPU.
        """
        room = [host for host in self._hosts if self._trials_of(host) < self._slots.sharing]
        if not room or len(self._hosts) + len(self._retired) < self._slots.hosts:
            self._hosts.append(self._start())
            room = self._hosts[-1:]
        host = min(room, key=self._trials_of)
        self._places[job.id] = host
        return {"job": job, "host": host}

    def left(self, job_id: str, *, lost: bool) -> None:
        """This attempt is over; `lost`: its relay is gone, and the process may not know it."""
        host = self._places.pop(job_id, None)
        if host is None:
            return
        if lost:
            host.give_up.remote(job_id)
        host.close.remote(job_id)
        if host in self._retired and not self._trials_of(host):
            self._retired.remove(host)
            ray.kill(host)

    def retire(self, job_id: str) -> bool:
        """The process of this attempt gets no more trials; those in it go on to their ends. It is not Tune's own."""
        host = self._places[job_id]
        if host in self._hosts:
            self._hosts.remove(host)
            self._retired.append(host)
        return False

    def end(self) -> None:
        """End every process at once; where Ray has died, they have died with it."""
        hosts, self._hosts, self._retired = [*self._hosts, *self._retired], [], []
        try:
            check_ray()
        except RayDied:
            return
        for host in hosts:
            ray.kill(host)

    def _trials_of(self, host: Any) -> int:
        return list(self._places.values()).count(host)

    def _start(self) -> Any:
        remote: Any = ray.remote  # its types know of no groups
        more = self._slots.of_process
        return (
            remote(concurrency_groups={BESIDE: 1})(Host)
            .options(
                num_cpus=more.pop("CPU"),
                num_gpus=more.pop("GPU", 0.0),
                resources=more,
                max_restarts=-1,
                max_task_retries=0,
            )
            .remote(*self._given)
        )


class Relay(Trainable):
    """Tune's worker of a trial that another process trains: it passes the reports on and computes nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        """Have the attempt taken in."""
        self._job: Job = config["job"]
        self._host: Any = config["host"]
        until = time.monotonic() + _RESTART_SECONDS
        while True:
            try:
                _answer(self._host.begin.remote(self._job))
            except ActorUnavailableError as away:
                if time.monotonic() > until:
                    raise WorkerLost(_lost(away)) from None
                time.sleep(_POLL_SECONDS)
            else:
                return

    def step(self) -> dict[str, Any]:
        """The next report, once it was the trial's turn."""
        try:
            return {REPORT: _answer(self._host.pull.remote(self._job.id))}
        except ActorUnavailableError as away:
            raise WorkerLost(_lost(away)) from None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next attempt, maybe in another process."""
        self.setup(new_config)
        return True


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except ActorUnavailableError:
        raise
    except (RayActorError, OutOfMemoryError) as died:
        raise WorkerLost(_lost(died)) from None


def _lost(error: Exception) -> str:
    why = redact(" ".join(str(error).split()))
    return f"the process that it shares with other trials ended: {type(error).__name__}: {why}"
