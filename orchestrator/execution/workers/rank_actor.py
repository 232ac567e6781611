"""One process of a trial that has several: a Ray actor that makes a step when all the others do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from orchestrator.execution.messages import End, ended_by
from orchestrator.execution.workers.attempt_runner import WATCH_SECONDS, OpenWorkshop, Workshop
from trainer.config.trial import TrialConfig
from trainer.results import Ending, Point

BESIDE = "beside"
"""The group of calls that are taken while a step is made."""


@dataclass(frozen=True, slots=True)
class Said:
    """A point, or how it ended: by itself, or by an exception. `counters` says what this process has loaded so far."""

    point: Point | None = None
    ending: Ending | None = None
    failed: End | None = None
    counters: Mapping[str, int] = field(default_factory=dict[str, int])


class Rank:
    """Number `number` of `size`. The first one writes the files and is heard; the others keep in step with it."""

    def __init__(self, number: int, size: int, cache: Path, opened: OpenWorkshop) -> None:
        self._number, self._size, self._cache, self._open = number, size, cache, opened
        self._socket: socket.socket | None = None
        self._workshop: Workshop | None = None
        self._course: Generator[Point, None, Ending] | None = None
        self._folder = Path()
        self._run = 0
        self._between = threading.Lock()
        """Held while one run gives way to the next, so that an interrupt is of the one that it was meant for."""
        threading.Thread(target=_end_with_ray, args=(os.getppid(),), daemon=True).start()

    def gpus(self) -> list[str]:
        """What Ray gave to this process."""
        found: list[Any] = ray.get_gpu_ids()
        return [str(gpu) for gpu in found]

    def listen(self) -> int:
        """Of the first one: where the others find it."""
        from trainer.distributed.processes import listen

        self._socket = listen()
        port: int = self._socket.getsockname()[1]
        return port

    def join(self, port: int, gpus: Sequence[str]) -> int:
        """Meet the others, then open the workshop; the process id."""
        from trainer.distributed.processes import join

        join(self._number, self._size, port, self._socket, gpus)
        self._workshop = self._open(self._cache)
        return os.getpid()

    def begin(self, run: int, config: str, folder: Path, earlier: Sequence[Path], fork: Path | None) -> None:
        """Train this next, as run number `run`; nothing is computed yet."""
        assert self._workshop is not None
        # A failure of another process than the first is told beside that one's, never over it.
        self._folder = folder if self._number == 0 else folder / f"process-{self._number}"
        with self._between:
            self._run = run
            self._course = self._workshop.train(TrialConfig.model_validate_json(config), folder, earlier, fork)

    def next(self) -> Said:
        """The next point, or the end."""
        assert self._course is not None
        assert self._workshop is not None
        point, ending, failed = None, None, None
        try:
            point = next(self._course)
        except StopIteration as done:
            ending = done.value
        except Exception as error:  # noqa: BLE001  the trial boundary: an exception becomes recorded data
            failed = ended_by(error, self._folder)
        if point is None:
            self._course = None
        return Said(point, ending, failed, dict(self._workshop.counters))

    def close(self) -> None:
        """Stop here, as all the others do."""
        if self._course is not None:
            self._course.close()
            self._course = None

    @ray.method(concurrency_group=BESIDE)
    def interrupt(self, run: int) -> None:
        """Have this run save a checkpoint and end; the processes agree among themselves when. Late, it does nothing."""
        with self._between:
            if run == self._run and self._course is not None and self._workshop is not None:
                self._workshop.interrupt()


def _end_with_ray(raylet: int) -> None:
    wait = threading.Event()
    while not wait.wait(WATCH_SECONDS):
        if os.getppid() != raylet:
            os._exit(1)
