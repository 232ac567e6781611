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
from orchestrator.interfaces import (
    BatchReceiver,
    MessageRejected,
    ProbedReceiver,
    TrackingReceiver,
    TrackingUnavailable,
)
from orchestrator.redaction import redact_all, secret_values
from orchestrator.study.pruning.divergence_guard import as_number
from orchestrator.tracking.deferred_messages import MESSAGES, POSITION, DeferredMessages
from orchestrator.tracking.message_journal import (
    EndRun,
    Journal,
    LogArtifact,
    LogFinalMetrics,
    LogMetrics,
    SetTags,
    StartRun,
    TrackingMessage,
    deliver,
    stored_path,
    with_present_path,
)
from orchestrator.tracking.run_metadata import FIRST_ATTEMPT
from trainer.results import StepMetrics
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock


def group_messages(messages: Sequence[TrackingMessage]) -> list[list[int]]:
    """Return groups of indexes of messages that are delivered in one call, ordered by their first message.

    Metrics of a run are grouped unless another message of that run is between them, so that each run's messages stay in
    order. All messages before a group's first one are in earlier groups.
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
"""Seconds between retries while the receiver is unreachable: the first, doubled up to the maximum."""
FILE_TRIES, MESSAGE_TRIES = 3, 10
"""Failures in a row of a file, and of any other message, while the receiver takes other writes: then it is passed over.
A file is tried again later. Another message would arrive out of order, so it is given up, and only after minutes.
"""
RETRY_SECONDS = 300.0
"""Seconds between tries of files that were passed over."""
BATCH_SIZE = 1000
"""Messages read at a time; with more than these waiting, delivery does not pause."""
CPU_FRACTION = 0.25
"""Largest share of a CPU's time for delivery while it keeps up, as its thread competes with the driver's."""
MAX_PAUSE = 5.0
"""Longest pause of delivery, in seconds, that keeps it below CPU_FRACTION."""
SWITCH_INTERVAL = 0.0005
"""Seconds between thread switches. At Python's default (5 ms) a report, with a dozen disk writes, takes up to 60 ms
longer."""


class OutboxLocked(StorageRefused):
    """Another process delivers from this outbox."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"another process delivers from {folder}")


class Outbox:
    """A TrackingSink that never waits for its receiver. One process at a time can open it.

    Files: `messages.jsonl` (all messages), `delivered.json` (position of delivery), `refused.jsonl` (messages
    that the receiver rejected), `deferred.json` (files that could not be attached yet, while other messages arrived).
    Paths of files are stored relative to the sweep's folder, which may move.
    Delivery is at least once; receivers ignore repeated messages.
    """

    def __init__(
        self,
        folder: Path,
        receiver: TrackingReceiver,
        *,
        fence: Callable[[], None] = lambda: None,
        lock_timeout: float = 0.0,
        patience: float = 0.0,
    ) -> None:
        """Open the outbox in `folder`, inside the sweep's folder.

        Args:
            folder: Folder of the outbox.
            receiver: Where messages are delivered.
            fence: Raises SweepHeld after another driver took over: then no message is enqueued or delivered.
            lock_timeout: Seconds to wait for another process that delivers from this outbox.
            patience: Seconds for which delivery waits for the first metrics: MLflow takes two seconds of a CPU to load.

        Raises:
            OutboxLocked: Another process delivers from it.
        """
        self._folder, self._receiver, self._fence = folder, receiver, fence
        self._lock = FileLock(folder / "lock")
        if not self._lock.acquire(timeout=lock_timeout):
            raise OutboxLocked(folder)
        self._journal = Journal(folder / MESSAGES)
        self._deferred = DeferredMessages(folder)
        self._next_retry = 0.0
        self._last_step: dict[str, int] = {}
        self._first_attempt: dict[str, str] = {}
        self._latest = 0.0
        for _, message in self._journal.scan():
            self._track_state(message)
        self._seq, self._offset = _read_position(folder / POSITION, self._journal)
        self._changed = threading.Condition()
        self._closing = self._is_abandoned = self._closed = self._had_last_try = False
        self._failure = ""
        self._begins = time.monotonic() + patience
        sys.setswitchinterval(min(SWITCH_INTERVAL, sys.getswitchinterval()))
        self._thread = threading.Thread(target=self._deliver_all, name="outbox", daemon=True)
        self._thread.start()

    # --- calls of the driver -------------------------------------------------------------------------------------

    def start_run(self, run: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str], at: float) -> None:
        """Start a run, or continue it."""
        self._enqueue(StartRun(run, name, params, tags, at))

    def log_metrics(self, run: str, metrics: Sequence[StepMetrics], *, at: float) -> None:
        """Log metrics; steps that were logged before, in this process or an earlier one, are skipped."""
        last = self._last_step.get(run)
        fresh = {p.step: p for p in reversed(metrics) if last is None or p.step > last}
        if fresh:
            numbers = [StepMetrics(s, {n: as_number(v) for n, v in fresh[s].metrics.items()}) for s in sorted(fresh)]
            self._enqueue(LogMetrics(run, numbers, at))

    def log_final_metrics(self, run: str, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Log values that are no time series."""
        self._enqueue(LogFinalMetrics(run, {name: as_number(value) for name, value in values.items()}, step, at))

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._enqueue(SetTags(run, tags))

    def log_artifact(self, run: str, path: Path, folder: str = "") -> None:
        """Attach a file with its content at the time of delivery."""
        self._enqueue(LogArtifact(run, stored_path(path.resolve(), self._folder.resolve().parent), folder))

    def end_run(self, run: str, *, status: str, tags: Mapping[str, str], at: float) -> None:
        """End a run with status FINISHED, FAILED or KILLED."""
        self._enqueue(EndRun(run, status, tags, at))

    @property
    def pending(self) -> int:
        """Number of messages that are not delivered yet."""
        return self._journal.last - self._seq

    @property
    def delivery_error(self) -> str:
        """Why delivery fails at present; "" if it does not."""
        return self._failure

    @property
    def refused(self) -> str:
        """How many messages were refused for good and why the last one was; "" if none was."""
        return f"{self._deferred.refused} ({self._deferred.reason})" if self._deferred.refused else ""

    def close(self, timeout: float) -> int:
        """Deliver for up to `timeout` seconds and close; return how many messages stay for the next opening."""
        if self._closed:
            return self._left
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._left and self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.2))
            self._is_abandoned = self._closed = True
            self._changed.notify_all()
        self._thread.join(0.5)  # a receiver that hangs keeps the daemon thread, which no longer writes to the outbox
        self._journal.close()
        self._lock.release()
        return self._left

    @property
    def _left(self) -> int:
        return self.pending + len(self._deferred.waiting)

    # --- inside --------------------------------------------------------------------------------------------------

    def _enqueue(self, message: TrackingMessage) -> None:
        self._fence()
        with self._changed:
            if self._closed:
                raise RuntimeError("the outbox is closed")
            message = self._monotonic(message)
            failpoint("outbox.append")
            self._journal.append(redact_message(message))
            failpoint("outbox.appended")
            self._track_state(message)
            self._begins = 0.0 if isinstance(message, LogMetrics) else self._begins
            self._changed.notify_all()

    def _monotonic(self, message: TrackingMessage) -> TrackingMessage:
        """Return the message with a time not before the previous one's: a clock set back gives no negative duration."""
        if isinstance(message, (SetTags, LogArtifact)):
            return message
        return replace(message, at=max(message.at, self._latest))

    def _track_state(self, message: TrackingMessage) -> None:
        if not isinstance(message, (SetTags, LogArtifact)):
            self._latest = max(self._latest, message.at)
        if isinstance(message, StartRun):
            first = message.tags.get(FIRST_ATTEMPT, "1")
            if self._first_attempt.get(message.run, "1") != first:  # retried after a failure: its steps begin again
                self._last_step.pop(message.run, None)
            self._first_attempt[message.run] = first
        if isinstance(message, LogMetrics):
            self._last_step[message.run] = max(self._last_step.get(message.run, -1), *(p.step for p in message.metrics))

    def _deliver_all(self) -> None:
        """The delivery thread. Errors other than TrackingUnavailable and MessageRejected are bugs and end it."""
        finished = warm = False  # the first call imports and connects, so its CPU time is not used for pacing
        try:
            while (work := self._wait_for_work()) is not None:
                began = time.thread_time()
                if not (self._deliver_some(*work) if work[0] < work[1] else self._retry_files()):
                    break
                usage = time.thread_time() - began
                if warm and self.pending < BATCH_SIZE:
                    self._pause(min(usage / CPU_FRACTION - usage, MAX_PAUSE))
                warm = True
            finished = True
        finally:
            with self._changed:
                if not finished:
                    self._failure = "delivery ended by an internal error (traceback above); messages stay on disk"
                self._changed.notify_all()

    def _wait_for_work(self) -> tuple[int, int] | None:
        """Wait for messages; return the range of offsets to deliver, None when closed.

        The range is empty where files that were passed over are due: now and then, and once more while closing.
        """
        with self._changed:
            while not self._closing and (left := self._begins - time.monotonic()) > 0:
                self._changed.wait(left)
            while self._offset >= self._journal.end and not self._closing and not self._retry_is_due():
                self._changed.wait(self._next_retry - time.monotonic() if self._deferred.waiting else None)
            is_last_try = self._closing and self._deferred.waiting and not self._had_last_try
            if self._is_abandoned or (self._offset >= self._journal.end and self._closing and not is_last_try):
                return None
            self._had_last_try = self._had_last_try or (self._offset >= self._journal.end and self._closing)
            return self._offset, self._journal.end

    def _retry_is_due(self) -> bool:
        return bool(self._deferred.waiting) and time.monotonic() >= self._next_retry

    def _retry_files(self) -> bool:
        """Try every file that was passed over once; return False when closed or when another driver took over."""
        for seq, message in self._deferred.waiting:
            if self._is_abandoned:
                return False
            try:
                self._fence()
                self._deliver_group([message])
            except SweepHeld as error:
                self._failure = f"tracking stopped: {error}"
                return False
            except (TrackingUnavailable, StorageRefused):
                continue
            except MessageRejected as error:
                self._reject(seq, message, error)
            else:
                self._deferred.remove(seq, message)
        self._next_retry = time.monotonic() + RETRY_SECONDS
        return True

    def _pause(self, seconds: float) -> None:
        """Pause, so that the driver has the CPU; messages that arrive meanwhile are grouped into fewer calls."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _deliver_some(self, offset: int, end: int) -> bool:
        """Deliver one batch, grouped if the receiver is a BatchReceiver; return False when closed meanwhile."""
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
            self._advance(seq + until, read[until - 1][1])  # all messages before the next group are delivered
        return True

    def _deliver(self, group: Sequence[tuple[int, TrackingMessage]]) -> bool:
        """Retry until the receiver accepts or rejects a group; False when closed or when another driver took over.

        A rejected group is delivered message by message, so that only the rejected ones are dropped to `refused.jsonl`.
        A message that fails while the receiver takes other writes is passed over after some tries.
        """
        wait, failed_alone = FIRST_WAIT, 0
        while not self._is_abandoned:
            try:
                self._fence()
                self._deliver_group([message for _, message in group])
            except SweepHeld as error:
                self._failure = f"tracking stopped: {error}"
                return False
            except (TrackingUnavailable, StorageRefused) as error:
                if not self._failure:
                    _log.warning("tracking is unreachable, messages wait on disk: %s", error)
                self._failure = str(error)
                failed_alone = failed_alone + 1 if isinstance(error, TrackingUnavailable) and self._can_write() else 0
                if failed_alone >= (FILE_TRIES if isinstance(group[0][1], LogArtifact) else MESSAGE_TRIES):
                    if len(group) > 1:
                        return all(self._deliver([one]) for one in group)
                    self._defer(*group[0], error)
                    return True
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

    def _deliver_group(self, group: Sequence[TrackingMessage]) -> None:
        if len(group) > 1 and isinstance(self._receiver, BatchReceiver):
            self._receiver.log_metric_history(
                group[0].run, [(m.metrics, m.at) for m in group if isinstance(m, LogMetrics)]
            )
        else:
            deliver(self._receiver, with_present_path(group[0], self._folder.resolve().parent))

    def _can_write(self) -> bool:
        """Return whether the receiver takes writes now; False if it cannot say."""
        if not isinstance(self._receiver, ProbedReceiver):
            return False
        try:
            self._receiver.probe()
        except (TrackingUnavailable, MessageRejected):
            return False
        return True

    def _wait(self, seconds: float) -> None:
        """Wait; while closing, at most FIRST_WAIT, to use the remaining time for retries."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._is_abandoned and (left := until - time.monotonic()) > 0:
                if self._closing:
                    left = min(left, FIRST_WAIT)
                    until = min(until, time.monotonic() + left)
                self._changed.wait(left)

    def _reject(self, seq: int, message: TrackingMessage, error: MessageRejected) -> None:
        _log.error("tracking rejected a message of run %s, moved to refused.jsonl: %s", message.run, error)
        self._deferred.refuse(seq, message, str(error))

    def _defer(self, seq: int, message: TrackingMessage, error: Exception) -> None:
        what = f"attach {message.path}" if isinstance(message, LogArtifact) else "take a message"
        _log.error("tracking cannot %s for run %s, other messages continue: %s", what, message.run, error)
        self._deferred.add(seq, message, str(error))
        self._failure = ""
        self._next_retry = time.monotonic() + RETRY_SECONDS

    def _advance(self, seq: int, offset: int) -> None:
        with self._changed:
            if self._is_abandoned:
                return
            self._seq, self._offset = seq, offset
            # Not flushed: without it messages are delivered again, which changes nothing.
            temporary = self._folder / f"{POSITION}.tmp"
            temporary.write_text(json.dumps({"seq": self._seq, "offset": self._offset, "journal": self._journal.name}))
            temporary.replace(self._folder / POSITION)
            failpoint("outbox.advanced")
            self._changed.notify_all()


def redact_message(message: TrackingMessage) -> TrackingMessage:
    """Return the message with the environment's secrets masked."""
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
    """Number and end offset of the last delivered message.

    Without the file, or with the position of another journal, delivery starts over; receivers ignore repeated messages.
    An older version's file names no journal: it is used if a message of that number ends at its offset.
    """
    if not path.is_file():
        return 0, 0
    try:
        stored = json.loads(path.read_text())
        seq, offset, name = int(stored["seq"]), int(stored["offset"]), str(stored.get("journal", journal.name))
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning("%s is not readable: everything is delivered again (repeated messages change nothing)", path)
        return 0, 0
    if name == journal.name and journal.has_message_end(seq, offset):
        return seq, offset
    _log.warning("%s is of another journal: all of this one is delivered (repeated messages change nothing)", path)
    return 0, 0
