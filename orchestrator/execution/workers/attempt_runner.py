"""One attempt at a trial inside a worker process, pulled from outside. Knows no Ray."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from orchestrator.execution.messages import WORKER_FILE, DeviceFailed, End, EndKind, Job, Report, WorkerLost, ended_by
from orchestrator.execution.workers.mirror_upload import Copies
from orchestrator.study.database import driver_lease
from trainer.config.trial import TrialConfig
from trainer.metrics import EVAL
from trainer.results import Ending, Point
from trainer.results import EndKind as TrainerEnd

GROUP_SECONDS = 0.5
"""Training points are gathered this long, so that fast steps do not flood the driver."""
_LOCK_SECONDS = 20.0
_FAR_SECONDS = 120.0
"""For a holder on another machine: a network disk frees the locks of a dead machine after a minute or two."""
WATCH_SECONDS = 0.2


class Workshop(Protocol):
    """What stays loaded in a worker between trials: trainer.training_session.Workshop, or a script in tests."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What was loaded, and how often."""
        ...

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Point, None, Ending]:
        """Train one configuration, from another run's checkpoint in `fork` where that is given. Closing the generator
        stops it at once and saves nothing."""
        ...

    def interrupt(self) -> None:
        """Have the run that `train` was called for last save a checkpoint and end as STOPPED; from any thread.

        Nothing happens where that run is over: the next one knows nothing of it.
        """
        ...


class Hall(Workshop, Protocol):
    """A workshop that others may stand beside: they share what is loaded and does not change."""

    def beside(self) -> Workshop:
        """Another one in this process; trials in all of them go on in turn, a point at a time."""
        ...


OpenWorkshop = Callable[[Path], Workshop]


def open_workshop(cache: Path, *, trust_remote_code: bool = False) -> Workshop:
    """The trainer's own; imported here, so that only workers pay for torch."""
    from trainer.training_session import Workshop as Trainers

    return Trainers(cache, trust_remote_code=trust_remote_code)


class Attempt:
    """Points and the end of one attempt. After an end, or `close`, there is nothing more to pull."""

    def __init__(self, job: Job, workshop: Callable[[], Workshop], *, patience: float = _LOCK_SECONDS) -> None:
        """`patience`: seconds to wait for another process that works in the same place."""
        self._job, self._workshop, self._patience = job, workshop, patience
        self._course: Generator[Point, None, Ending] | None = None
        self._lock: IO[str] | None = None
        self._copies = None if job.mirror is None else Copies(job)
        self._over = threading.Event()
        self._interrupting = threading.Lock()
        """Held while the workshop is interrupted: never for this attempt's sake once its run is over."""

    def pull(self) -> Report:
        """The next points: until an evaluation, the end, or half a second. WorkerLost is nobody's to record here;
        DeviceFailed, one of these, where this very process has to end."""
        points: list[Point] = []
        end: End | None = None
        try:
            end = self._gather(points)
        except WorkerLost:
            self._lose()
            raise
        except Exception as error:  # noqa: BLE001  the trial boundary: an exception becomes recorded data
            end = ended_by(error, self._job.folder)
            if end.kind is EndKind.LOST:
                self._lose()
                raise DeviceFailed(end.reason) from None
        if end is not None:
            if self._copies is not None and self._course is not None:
                self._copies.finish(end)
            self._let_go()
        return self._report(points, end)

    def close(self) -> None:
        """Stop here: the driver has decided."""
        if self._course is not None:
            self._course.close()
            if self._copies is not None:
                self._copies.leave(wanted=False)
        self._let_go()

    def _lose(self) -> None:
        if self._copies is not None:
            self._copies.leave(wanted=True)
        self._let_go()

    def _report(self, points: list[Point], end: End | None) -> Report:
        counters = dict(self._workshop().counters) if self._course else {}
        if self._copies is None:
            return Report(tuple(points), end, os.getpid(), counters)
        return Report(tuple(points), end, os.getpid(), {**counters, **self._copies.counters}, self._copies.said())

    def _gather(self, points: list[Point]) -> End | None:
        until = time.monotonic() + GROUP_SECONDS
        if self._course is None:
            if self._job.stop_asked:
                return End(EndKind.RELEASED, "asked to stop before it began")
            self._job.folder.mkdir(parents=True, exist_ok=True)
            (self._job.folder / WORKER_FILE).write_text(driver_lease.signature(), encoding="utf-8")
            workshop = self._workshop()
            self._lock = _hold(self._job, self._patience)
            if self._lock is None:
                return End(EndKind.RELEASED, "asked to stop before it began")
            config = TrialConfig.model_validate_json(self._job.config)
            earlier = self._job.earlier if self._copies is None else self._copies.fetch()
            self._course = workshop.train(config, self._job.folder, earlier, self._job.fork)
            if self._copies is not None:
                self._copies.begin()
            threading.Thread(target=self._watch, args=(workshop,), daemon=True).start()
        while True:
            try:
                point = next(self._course)
            except StopIteration as done:
                return _end_of(done.value)
            points.append(point)
            if any(name.startswith(EVAL) for name in point.metrics) or time.monotonic() >= until:
                return None

    def _watch(self, workshop: Workshop) -> None:
        """Beside the training: the driver may want the trial back, or be dead."""
        ray = os.getppid()
        while not self._over.wait(WATCH_SECONDS):
            if os.getppid() != ray:
                os._exit(1)  # Ray is gone, and the driver with it: another attempt may begin any moment
            if self._job.stop_asked:
                with self._interrupting:
                    if not self._over.is_set():
                        workshop.interrupt()

    def _let_go(self) -> None:
        with self._interrupting:
            self._over.set()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _end_of(ending: Ending) -> End:
    match ending.kind:
        case TrainerEnd.FINISHED:
            kind = EndKind.FINISHED
        case TrainerEnd.DIVERGED:
            kind = EndKind.DIVERGED
        case TrainerEnd.STOPPED:  # somebody wanted it back: no outcome of the trial
            kind = EndKind.RELEASED
    return End(kind, ending.reason, steps=ending.steps)


def _hold(job: Job, patience: float) -> IO[str] | None:
    """The lock of the trial's folder; None when the driver wants the trial back before that.

    Whoever holds it works on an older attempt, which nobody listens to any more: given time to end, it is ended.
    """
    job.lock.parent.mkdir(parents=True, exist_ok=True)
    held = job.lock.open("a+", encoding="utf-8")
    began = time.monotonic()
    until = began + patience
    while not job.stop_asked:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                holder = job.lock.read_text(encoding="utf-8")
                if driver_lease.put_down(holder):
                    until = time.monotonic() + patience
                    continue
                if not driver_lease.is_elsewhere(holder):
                    held.close()
                    raise TimeoutError(f"another process still works on this trial ({job.lock})") from None
                if time.monotonic() > began + max(patience, _FAR_SECONDS):
                    held.close()
                    raise WorkerLost(f"{driver_lease.shown(holder)} still works on this trial ({job.lock})") from None
            time.sleep(0.1)
        else:
            held.truncate(0)
            held.write(driver_lease.signature())
            held.flush()
            return held
    held.close()
    return None
