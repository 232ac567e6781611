"""`SweepLog`: what happened in a sweep, or in one of its trials, as lines of text that can be followed.

A sweep's log is its history and, below it, the output of its detached driver. A trial's log is its events, its metrics
by update, and the traceback of each attempt that failed. All of it is read from the study and from files, also
after the sweep has ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from orchestrator import folders
from orchestrator.commands.request_commands import RequestRefused, record_of
from orchestrator.folders import FAILURE_FILE, SweepFolder, existing_sweep
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import ISSUED, Event
from trainer.results import StepMetrics

_POLL_SECONDS = 0.5


@dataclass
class _Tail:
    """A text file that another process appends to; a file that was replaced or cut is read from its beginning."""

    path: Path
    most: int | None = None
    """Bytes that one call reads; of more than that, the last ones."""
    offset: int = 0
    inode: int = 0
    rest: bytes = b""

    def new_lines(self, *, at_end: bool) -> list[str]:
        """Return the complete lines since the last call; `at_end`: also the last one without a line break."""
        try:
            with self.path.open("rb") as file:
                state = self.path.stat()
                if state.st_ino != self.inode or state.st_size < self.offset:
                    self.offset, self.inode, self.rest = 0, state.st_ino, b""
                left_out = 0 if self.most is None else max(0, state.st_size - self.offset - self.most)
                self.offset += left_out
                file.seek(self.offset)
                content = file.read(-1 if self.most is None else self.most)
        except FileNotFoundError:
            return []
        self.offset += len(content)
        if left_out:
            self.rest, content = b"", f"[{left_out} bytes are left out here]\n".encode() + content
        whole, mark, rest = (self.rest + content).rpartition(b"\n")
        self.rest = rest
        lines = whole.decode(errors="replace").split("\n") if mark else []
        if at_end and rest:
            lines, self.rest = [*lines, rest.decode(errors="replace")], b""
        return lines


@dataclass
class SweepLog:
    """The log of a sweep, or of its trial `number` and there of one `attempt` where that is given."""

    folder: SweepFolder
    number: int | None = None
    attempt: int | None = None
    most: int | None = None
    """Bytes of the driver's output that one call of `new_lines` reads; of more than that, the last ones."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _study: StudyReader | None = None
    _seq: int = 0
    _step: int = -1
    _shown: set[Path] = field(default_factory=set[Path])
    _issued: int = 0
    _driver_output: _Tail = field(init=False)

    def __post_init__(self) -> None:
        self._driver_output = _Tail(self.folder.log, self.most)

    @classmethod
    def open(
        cls, name: str, root: Path, number: int | None = None, attempt: int | None = None, *, most: int | None = None
    ) -> Self:
        """Open the log of a sweep that exists.

        Raises:
            RequestRefused: it has no such trial, or the trial no such attempt.
        """
        folder = existing_sweep(root, name)
        log = cls(folder, number, attempt, most)
        log._open_study()
        if number is not None:
            if log._study is None:
                raise RequestRefused(f"{name} has no trials yet")
            attempts = record_of(log._study, number).attempts
            if attempt is not None and not 1 <= attempt <= attempts:
                log.close()
                raise RequestRefused(f"trial {number} of {name} has no attempt {attempt} (it has 1 to {attempts})")
        return log

    def _open_study(self) -> None:
        if self._study is None and StudyReader.exists(self.folder):
            self._study = self._stack.enter_context(StudyReader.open(self.folder, read_only=True))

    def close(self) -> None:
        """Close the study."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_lines(self, *, at_end: bool = True) -> list[str]:
        """Return what was added since the last call; `at_end`: also a line that is not complete."""
        self._open_study()
        lines: list[str] = []
        if self._study is not None:
            events = self._study.events(self._seq)
            self._seq = max([self._seq, *(event.seq for event in events)])
            lines += [_event_line(event) for event in events if self._concerns(event)]
        if self.number is None:
            return lines + self._driver_output.new_lines(at_end=at_end)
        return lines + self._metric_lines() + self._tracebacks()

    def _concerns(self, event: Event) -> bool:
        if self.number is None:
            return True
        if event.trial != self.number:
            return False
        self._issued += event.kind == ISSUED
        return self.attempt is None or self._issued == self.attempt

    def _metric_lines(self) -> list[str]:
        if self._study is None or self.number is None or self.attempt is not None:
            return []  # points belong to the trial: an attempt that continues another one repeats none
        points = [point for point in self._study.metric_history(self.number) if point.step > self._step]
        self._step = max([self._step, *(point.step for point in points)])
        return [_metric_line(point) for point in points]

    def _tracebacks(self) -> list[str]:
        lines: list[str] = []
        assert self.number is not None
        attempts = sorted(self.folder.trial(self.number).glob("*/" + FAILURE_FILE), key=lambda p: int(p.parent.name))
        for path in attempts:
            if path in self._shown or self.attempt not in (None, int(path.parent.name)):
                continue
            self._shown.add(path)
            lines.append(f"attempt {path.parent.name} failed ({path}):")
            lines += [f"  {line}" for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        return lines

    def has_ended(self) -> bool:
        """Return whether nothing more will come: no driver runs, or the trial has ended."""
        if folders.lock_holder(self.folder) is None:
            return True
        if self._study is None or self.number is None:
            return False
        return record_of(self._study, self.number).state.is_final

    def followed(self) -> Iterator[list[str]]:
        """Yield new lines as they come, until the sweep's driver or the trial has ended."""
        while True:
            ended = self.has_ended()  # asked first, so that its last lines are read
            if lines := self.new_lines(at_end=ended):
                yield lines
            if ended:
                return
            time.sleep(_POLL_SECONDS)

    def other_logs(self) -> list[str]:
        """Return where other logs of the sweep are: crashes of its drivers, and Ray's, kept where Ray had to end."""
        ray = self.folder.path / "ray" / "logs"
        found = [f"crash of a driver: {path}" for path in sorted(self.folder.path.glob(folders.CRASH_FILES))]
        return found + ([f"Ray's own logs, of workers too: {ray}"] if ray.is_dir() else [])


def _event_line(event: Event) -> str:
    when = time.strftime("%F %T", time.localtime(event.at))
    trial = "" if event.trial is None else f"trial {event.trial}: "
    return f"{when}  {trial}{event.kind}{f': {event.text}' if event.text else ''}"


def _metric_line(point: StepMetrics) -> str:
    return f"update {point.step}: " + "  ".join(f"{name}={value:.6g}" for name, value in sorted(point.metrics.items()))
