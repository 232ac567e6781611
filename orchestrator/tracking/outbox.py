"""`Outbox`: a durable queue of tracking messages. A message is on disk before the call returns; a thread delivers.

Waiting metrics of one run are grouped, so that delivery takes few calls.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageRefused, SweepHeld
from orchestrator.interfaces import BatchReceiver, MessageRejected, TrackingReceiver, TrackingUnavailable
from orchestrator.redaction import redact_all, secret_values
from orchestrator.study.pruning.divergence_guard import as_number
from orchestrator.tracking.message_journal import (
    EndRun,
    Journal,
    LogArtifact,
    LogFinalMetrics,
    LogMetrics,
    Message,
    SetTags,
    StartRun,
    deliver,
    encode,
)
from trainer.results import StepMetrics
from trainer.storage.atomic_files import FileLock, failpoint


def group_messages(messages: Sequence[Message]) -> list[list[int]]:
    """Places of messages that go in one call, each group where its first one stands.

    Points of a run go with those before them unless something else of that run came between: of each run everything
    stays in order. Whatever stands before a group's first message is in earlier groups.
    """
    out: list[list[int]] = []
    open_: dict[str, list[int]] = {}
    for index, message in enumerate(messages):
        if isinstance(message, LogMetrics) and message.run in open_:
            open_[message.run].append(index)
            continue
        out.append([index])
        if isinstance(message, LogMetrics):
            open_[message.run] = out[-1]
        else:
            open_.pop(message.run, None)
    return out


_log = logging.getLogger(__name__)

FIRST_WAIT = 0.5
MAX_WAIT = 30.0
"""Seconds between tries while the receiver is unreachable; doubled from the first to the longest."""
BATCH_SIZE = 1000
"""Messages looked at together; while more than these wait, delivery does not rest."""
CPU_FRACTION = 0.25
"""Of a processor's time, which delivery takes while it keeps up: the thread competes with the driver itself."""
MAX_REST = 5.0
"""Seconds by which delivery may be later for that."""
SWITCH_INTERVAL = 0.0005
"""Seconds after which delivery gives way to the driver's thread. Python's own 5 ms cost a report, which writes to the
disk a dozen times, as much as 60 ms."""


class OutboxLocked(StorageRefused):
    """Another process delivers from this outbox."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"another process delivers from {folder}")


class Outbox:
    """A TrackingSink that never waits for its receiver. One process at a time has it open.

    Files: `messages.jsonl` (all that was told), `delivered.json` (how far it got), `refused.jsonl` (what the receiver
    will never take). A message is delivered at least once; receivers ignore what they know, so it counts once.
    """

    def __init__(self, folder: Path, deliver: TrackingReceiver, *, fence: Callable[[], None] = lambda: None) -> None:
        """`fence` raises SweepHeld once another driver has taken over: from then on nothing is told or delivered."""
        self._folder, self._receiver, self._fence = folder, deliver, fence
        self._lock = FileLock(folder / "lock")
        if not self._lock.acquire(timeout=0):
            raise OutboxLocked(folder)
        self._journal = Journal(folder / "messages.jsonl")
        self._last_step: dict[str, int] = {}
        self._latest = 0.0
        for _, message in self._journal.scan():
            self._track_state(message)
        self._seq, self._offset = _read_position(folder / "delivered.json", self._journal)
        self._changed = threading.Condition()
        self._closing = self._is_abandoned = self._closed = False
        self._failure = ""
        sys.setswitchinterval(min(SWITCH_INTERVAL, sys.getswitchinterval()))
        self._thread = threading.Thread(target=self._deliver_all, name="outbox", daemon=True)
        self._thread.start()

    # --- what the driver calls -----------------------------------------------------------------------------------

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """A run begins, or begins again."""
        self._enqueue(StartRun(run, name, params, tags, at))

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        """Metrics at their steps; steps told before, in this process or an earlier one, are skipped."""
        last = self._last_step.get(run)
        fresh = {p.step: p for p in reversed(metrics) if last is None or p.step > last}
        if fresh:
            numbers = [StepMetrics(s, {n: as_number(v) for n, v in fresh[s].metrics.items()}) for s in sorted(fresh)]
            self._enqueue(LogMetrics(run, numbers, at))

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Numbers without a course."""
        self._enqueue(LogFinalMetrics(run, {name: as_number(value) for name, value in values.items()}, step, at))

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._enqueue(SetTags(run, tags))

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Attach a file, as it is when it is delivered."""
        self._enqueue(LogArtifact(run, path.resolve(), folder))

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        """A run is over."""
        self._enqueue(EndRun(run, status, tags, at))

    @property
    def pending(self) -> int:
        """How many messages are not yet delivered."""
        return self._journal.last - self._seq

    @property
    def trouble(self) -> str:
        """Why delivery stands still, in words; empty while all is well."""
        return self._failure

    def close(self, timeout: float) -> int:
        """Deliver what is left for up to `timeout` seconds; returns how many messages stay for a later opening."""
        if self._closed:
            return self.pending
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self.pending and self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.2))
            self._is_abandoned = self._closed = True
            self._changed.notify_all()
        self._thread.join(0.5)  # a receiver that hangs keeps the (daemon) thread: it can write nothing here any more
        self._journal.close()
        self._lock.release()
        return self.pending

    # --- inside --------------------------------------------------------------------------------------------------

    def _enqueue(self, message: Message) -> None:
        self._fence()
        with self._changed:
            if self._closed:
                raise RuntimeError("the outbox is closed")
            message = self._monotonic(message)
            failpoint("outbox.append")
            self._journal.append(redact_message(message))
            failpoint("outbox.appended")
            self._track_state(message)
            self._changed.notify_all()

    def _monotonic(self, message: Message) -> Message:
        """The message at a time no earlier than the one before it: a clock set back makes no negative durations."""
        if isinstance(message, (SetTags, LogArtifact)):
            return message
        return replace(message, at=max(message.at, self._latest))

    def _track_state(self, message: Message) -> None:
        if not isinstance(message, (SetTags, LogArtifact)):
            self._latest = max(self._latest, message.at)
        if isinstance(message, LogMetrics):
            self._last_step[message.run] = max(self._last_step.get(message.run, -1), *(p.step for p in message.metrics))

    def _deliver_all(self) -> None:
        """The thread. Any error but TrackingUnavailable and MessageRejected ends it, with a traceback: it is a bug."""
        finished = warm = False  # its first call imports and connects: that comes once
        try:
            while (work := self._wait_for_work()) is not None:
                began = time.thread_time()
                if not self._deliver_some(*work):
                    break
                usage = time.thread_time() - began
                if warm and self.pending < BATCH_SIZE:
                    self._rest(min(usage / CPU_FRACTION - usage, MAX_REST))
                warm = True
            finished = True
        finally:
            with self._changed:
                if not finished:
                    self._failure = "delivery ended by a fault of this program (traceback above); messages are kept"
                self._changed.notify_all()

    def _wait_for_work(self) -> tuple[int, int] | None:
        """From where to where there is something to deliver."""
        with self._changed:
            while self._offset >= self._journal.end and not self._closing:
                self._changed.wait()
            if self._is_abandoned or self._offset >= self._journal.end:
                return None
            return self._offset, self._journal.end

    def _rest(self, seconds: float) -> None:
        """Leave the processor to the driver for so long; what is told meanwhile takes fewer calls together."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _deliver_some(self, offset: int, end: int) -> bool:
        """What waits there, a run's points together where the receiver takes that; False when closed meanwhile."""
        read = self._journal.read(offset, end, BATCH_SIZE)
        messages, seq = [message for message, _ in read], self._seq
        together = (
            group_messages(messages) if isinstance(self._receiver, BatchReceiver) else [[k] for k in range(len(read))]
        )
        starts = [group[0] for group in together[1:]] + [len(read)]
        for group, until in zip(together, starts, strict=True):
            failpoint("outbox.deliver")
            if not self._deliver([(seq + 1 + index, messages[index]) for index in group]):
                return False
            failpoint("outbox.delivered")
            self._advance(seq + until, read[until - 1][1])  # nothing before the next group's start is left
        return True

    def _deliver(self, group: Sequence[tuple[int, Message]]) -> bool:
        """Try until the receiver takes or refuses these numbered messages; False when the outbox was closed meanwhile,
        or when another driver has taken over.

        Refused together, they are tried one by one: only those that are refused alone are set aside.
        """
        wait = FIRST_WAIT
        while not self._is_abandoned:
            try:
                self._fence()
                self._deliver_group([message for _, message in group])
            except SweepHeld as error:
                self._failure = f"nothing more is told: {error}"
                return False
            except (TrackingUnavailable, StorageRefused) as error:
                if not self._failure:
                    _log.warning("tracking is unreachable, messages wait on the disk: %s", error)
                self._failure = str(error)
                self._wait(wait)
                wait = min(2 * wait, MAX_WAIT)
            except MessageRejected as error:
                if len(group) > 1:
                    return all(self._deliver([one]) for one in group)
                self._reject(*group[0], error)
                return True
            else:
                self._failure = ""
                return True
        return False

    def _deliver_group(self, group: Sequence[Message]) -> None:
        if len(group) > 1 and isinstance(self._receiver, BatchReceiver):
            self._receiver.log_metric_history(
                group[0].run, [(m.metrics, m.at) for m in group if isinstance(m, LogMetrics)]
            )
        else:
            deliver(self._receiver, group[0])

    def _wait(self, seconds: float) -> None:
        """Wait; closing cuts the long waits short, as the time that is left is better spent on trying."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._is_abandoned and (left := until - time.monotonic()) > 0:
                if self._closing:
                    left = min(left, FIRST_WAIT)
                    until = min(until, time.monotonic() + left)
                self._changed.wait(left)

    def _reject(self, seq: int, message: Message, error: MessageRejected) -> None:
        _log.error("tracking refused a message of run %s, set aside: %s", message.run, error)
        with (self._folder / "refused.jsonl").open("ab") as stream:
            stream.write(encode(seq, message))

    def _advance(self, seq: int, offset: int) -> None:
        with self._changed:
            if self._is_abandoned:
                return
            self._seq, self._offset = seq, offset
            # Not flushed: losing it costs a second delivery, which changes nothing.
            temporary = self._folder / "delivered.json.tmp"
            temporary.write_text(json.dumps({"seq": self._seq, "offset": self._offset, "journal": self._journal.name}))
            temporary.replace(self._folder / "delivered.json")
            failpoint("outbox.advanced")
            self._changed.notify_all()


def redact_message(message: Message) -> Message:
    """The message without the secrets of this environment."""
    if isinstance(message, (LogMetrics, LogFinalMetrics, LogArtifact)):
        return message
    secrets = secret_values()
    match message:
        case StartRun(run, name, params, tags, at):
            return StartRun(run, name, redact_all(params, secrets), redact_all(tags, secrets), at)
        case SetTags(run, tags):
            return SetTags(run, redact_all(tags, secrets))
        case EndRun(run, status, tags, at):
            return EndRun(run, status, redact_all(tags, secrets), at)


def _read_position(path: Path, journal: Journal) -> tuple[int, int]:
    """How far delivery of this journal got: number and end of the last message that was delivered.

    Without a note, or with one of another journal, it starts over: receivers ignore what they know. An older version's
    note names no journal: it counts where its message ends where it says.
    """
    if not path.is_file():
        return 0, 0
    try:
        note = json.loads(path.read_text())
        seq, offset, name = int(note["seq"]), int(note["offset"]), str(note.get("journal", journal.name))
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning("%s is not readable: everything is delivered again (known messages change nothing)", path)
        return 0, 0
    if name == journal.name and journal.holds(seq, offset):
        return seq, offset
    _log.warning("%s is of another journal: all of this one is delivered (known messages change nothing)", path)
    return 0, 0
