"""The driver's side of processes that trials share: which trial is in which, and Tune's worker for such a trial."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError
from ray.tune import Trainable

from orchestrator.engine.attempt import OpenWorkshop
from orchestrator.engine.bridge import REPORT
from orchestrator.engine.cluster import Slots
from orchestrator.engine.failures import WorkerLost
from orchestrator.engine.host import Host
from orchestrator.engine.messages import Job
from orchestrator.engine.rank import BESIDE
from orchestrator.engine.vitals import RayDied, check_ray

_RESTART_SECONDS = 120.0
"""For a process that died to be there again."""
_POLL_SECONDS = 0.2


class Hosts:
    """As many processes as the slots need, each started at its first trial and again by Ray where it dies."""

    def __init__(self, slots: Slots, cache: Path, opened: OpenWorkshop) -> None:
        self._slots, self._given = slots, (cache, opened)
        self._hosts: list[Any] = []
        self._places: dict[str, int] = {}

    @property
    def trainable(self) -> type[Trainable]:
        """What Tune runs for each trial."""
        return Relay

    def config(self, job: Job) -> dict[str, Any]:
        """The trial's, with the process that has the fewest trials."""
        if len(self._hosts) < self._slots.hosts:
            self._hosts.append(self._start())
            number = len(self._hosts) - 1
        else:
            taken = list(self._places.values())
            number = min(range(len(self._hosts)), key=taken.count)
        self._places[job.id] = number
        return {"job": job, "host": self._hosts[number]}

    def left(self, job_id: str, *, lost: bool) -> None:
        """This attempt is over; `lost`: its relay is gone, and the process may not know it."""
        number = self._places.pop(job_id, None)
        if number is None:
            return
        if lost:
            self._hosts[number].give_up.remote(job_id)
        self._hosts[number].close.remote(job_id)

    def end(self) -> None:
        """End every process at once; where Ray has died, they have died with it."""
        hosts, self._hosts = self._hosts, []
        try:
            check_ray()
        except RayDied:
            return
        for host in hosts:
            ray.kill(host)

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
    return f"the process that it shares with other trials ended: {type(error).__name__}: {' '.join(str(error).split())}"
