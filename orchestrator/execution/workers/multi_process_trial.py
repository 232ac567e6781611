"""The processes of a trial on several GPUs, in the trial's placement group, seen from its worker as one workshop.

They make every step together: a point is asked of all, and closing the run closes it in all, so that none waits for
another that has stopped. One that dies ends the attempt: the others are killed, and the trial is issued again.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.execution.messages import End, EndKind, Told, WorkerLost
from orchestrator.execution.workers.attempt_runner import OpenWorkshop
from orchestrator.folders import FAILURE_FILE
from orchestrator.redaction import redact
from trainer.config.trial import TrialConfig
from trainer.results import Ending, Point

_POLL_SECONDS = 1.0
_CAUSE_SECONDS = 5.0
"""After a failure in one process: how long to wait for what the others say, of which one may be the cause."""
_CONSEQUENCES = ("gloo", "NCCL", "DistBackendError", "Connection closed by peer", "Connection reset by peer")
"""Words of a process that lost another one."""


class Ranks:
    """A workshop of several processes; they are started at the first trial and kept for the next."""

    def __init__(self, cache: Path, opened: OpenWorkshop, size: int, each: Mapping[str, float]) -> None:
        """`each`: what one of the processes asks of Ray."""
        self._cache, self._open, self._size, self._each = cache, opened, size, dict(each)
        self._actors: list[Any] = []
        self._counters: Mapping[str, int] = {}
        self._run = 0
        self._asked = threading.Event()
        """Whether the newest run is to end: each has an event and a number of its own."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What the first process has loaded."""
        return self._counters

    def interrupt(self) -> None:
        """Have the newest run save a checkpoint and end as STOPPED; from any thread. If it is over, nothing happens."""
        self._asked.set()
        for actor in self._actors[:1]:  # it may be in the middle of a long step
            actor.interrupt.remote(self._run)

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Point, None, Ending]:
        """Train one configuration in all processes. WorkerLost where one of them ends or its GPU fails; Told where one
        fails otherwise."""
        self._run += 1
        self._asked = threading.Event()
        return self._train(self._run, self._asked, config, folder, earlier, fork)

    def _train(
        self,
        run: int,
        asked: threading.Event,
        config: TrialConfig,
        folder: Path,
        earlier: Sequence[Path],
        fork: Path | None,
    ) -> Generator[Point, None, Ending]:
        try:
            if not self._actors:
                self._start()
            self._ask("begin", run, config.model_dump_json(), folder, list(earlier), fork)
            while True:
                if asked.is_set():  # before there was anybody to tell, perhaps
                    self._actors[0].interrupt.remote(run)
                said = self._ask("next")
                first = said.get(0)
                failed = {number: one.failed for number, one in said.items() if one.failed is not None}
                if failed or first is None:
                    raise self._failure(failed, folder)
                self._counters = first.counters
                if first.ending is not None:
                    return first.ending
                assert first.point is not None
                yield first.point
        except GeneratorExit:
            with contextlib.suppress(WorkerLost):  # the trial has ended whatever becomes of them
                self._ask("close")
            raise
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End every process at once."""
        import ray

        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)

    def _start(self) -> None:
        import ray
        from ray.util import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from orchestrator.execution.workers.rank_actor import BESIDE, Rank

        group = get_current_placement_group()
        assert group is not None, "the trial's worker is in a placement group"
        remote: Any = ray.remote  # its types know of no groups
        actor = remote(concurrency_groups={BESIDE: 1})(Rank)
        for number in range(self._size):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number + 1)
            more = dict(self._each)
            options = {"num_cpus": more.pop("CPU"), "num_gpus": more.pop("GPU", 0.0), "resources": more}
            made = actor.options(scheduling_strategy=place, **options).remote(
                number, self._size, self._cache, self._open
            )
            self._actors.append(made)
        given = self._ask("gpus")
        gpus = [gpu for number in range(self._size) for gpu in given[number]]
        port: int = ray.get(self._actors[0].listen.remote())
        self._ask("join", port, gpus)

    def _ask(self, method: str, *given: Any) -> dict[int, Any]:
        """What each process answers, by number. After a failure of one, those that answered soon after it."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError

        waiting = {getattr(actor, method).remote(*given): number for number, actor in enumerate(self._actors)}
        answers: dict[int, Any] = {}
        until = float("inf")
        while waiting and time.monotonic() < until:
            for done in ray.wait(list(waiting), timeout=_POLL_SECONDS)[0]:
                number = waiting.pop(done)
                try:
                    answers[number] = ray.get(done)
                except (RayActorError, OutOfMemoryError) as died:
                    self.end()
                    raise WorkerLost(f"process {number + 1} of {self._size} ended: {_line(died)}") from None
                if getattr(answers[number], "failed", None) is not None:
                    until = min(until, time.monotonic() + _CAUSE_SECONDS)
        return answers

    def _failure(self, failed: Mapping[int, End], folder: Path) -> Exception:
        number = _cause(failed, folder)
        if failed[number].kind is EndKind.LOST:
            return WorkerLost(f"process {number + 1} of {self._size} cannot go on: {failed[number].reason}")
        return Told(failed[number])


def _cause(failed: Mapping[int, End], folder: Path) -> int:
    """The process whose failure the others follow from; its traceback becomes the attempt's."""
    own = [n for n, end in failed.items() if not any(words in end.reason for words in _CONSEQUENCES)]
    lost = [n for n in own if failed[n].kind is EndKind.LOST]
    number = min(lost or own or failed)
    told = folder / f"process-{number}" / FAILURE_FILE
    if told.is_file():
        shutil.copyfile(told, folder / FAILURE_FILE)
    return number


def _line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))
