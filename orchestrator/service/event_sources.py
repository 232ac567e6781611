"""What can be watched: one sweep, the list of all, a log. Each reads what is new from the study and the files."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from orchestrator.commands.runs_folder.sweep_list import file_stamp
from orchestrator.errors import NoSuchSweep
from orchestrator.folders import SweepFolder, existing_sweep, lock_holder
from orchestrator.redaction import redact, secret_values
from orchestrator.service.service_context import ServiceContext, as_json, queue_json
from orchestrator.service.sweep_watchers import Message
from orchestrator.study.reader import StudyReader
from orchestrator.study.trial_records import Event

_POINTS_IN_A_MESSAGE = 200
_TIME_RESOLUTION = 0.1
"""A file's time says nothing about writes within the resolution of the kernel's clock."""
_LIST_SECONDS = 2.0
_SHOWN_LINES = 500
_READ_BYTES = 1 << 20


class SweepSource:
    """One sweep: `state`, `queue`, `judging`, `history`, `trials` that changed, `metrics` that were added."""

    def __init__(self, context: ServiceContext, name: str) -> None:
        """Raises NoSuchSweep."""
        if context.queued(name) is None:
            existing_sweep(context.root, name)
        self._context, self._name = context, name
        self._folder = SweepFolder(context.root, name)
        self._reader: StudyReader | None = None
        self._is_first = True
        self._stamp: Any = None
        self._holder: str | None = None
        self._seq = 0
        self._steps: dict[int, int] = {}
        self._state: dict[str, Any] = {}
        self._queue: dict[str, Any] | None = None
        self._judging: dict[str, Any] | None = None

    def close(self) -> None:
        """Close the study."""
        if self._reader is not None:
            self._reader.dispose()

    def snapshot(self) -> Any:
        """Return state, row of the queue and judge, the number of the last event and the last step of each trial."""
        steps = {str(number): step for number, step in self._steps.items()}
        return {
            "name": self._name,
            **self._state,
            "queue": self._queue,
            "judging": self._judging,
            "seq": self._seq,
            "steps": steps,
        }

    def read(self) -> Sequence[Message]:
        """Return what is new; nothing is read from a study whose files have not changed."""
        messages: list[Message] = []
        queue = queue_json(self._context.queued(self._name))
        if queue is None:
            existing_sweep(self._context.root, self._name)
        if queue != self._queue:
            self._queue = queue
            messages.append(("queue", queue))
        judging = self._context.judging(self._name)
        if judging != self._judging:
            self._judging = judging
            messages.append(("judging", judging))
        looked, holder = time.time(), lock_holder(self._folder)
        files = file_stamp(self._folder)
        stamp = None if files is None else (files, holder)
        if stamp is None or stamp != self._stamp:
            is_certain = files is not None and max(each[0] for each in files) < (looked - _TIME_RESOLUTION) * 1e9
            messages += self._read_study(is_other_driver=holder != self._holder)
            self._holder = holder
            self._stamp = stamp if is_certain else None
        if self._is_first:
            self._is_first = False
            return ()
        return messages

    def _read_study(self, *, is_other_driver: bool) -> list[Message]:
        if self._reader is None and self._folder.spec.is_file() and StudyReader.exists(self._folder):
            self._reader = StudyReader.open(self._folder, read_only=True)
        messages: list[Message] = []
        events: list[Event] = []
        if self._reader is not None:
            with self._reader.at_one_moment():
                events, points = self._reader.events(self._seq), self._points(self._reader)
            self._seq = max([self._seq, *(event.seq for event in events)])
            if events and not self._is_first:
                for event in events:
                    self._context.measures.event.add(max(0.0, time.time() - event.at))
                shown = [{"seq": e.seq, "at": e.at, "trial": e.trial, "kind": e.kind, "text": e.text} for e in events]
                messages.append(("history", as_json({"events": shown})))
            messages += points
        if self._reader is not None and not (events or is_other_driver or self._is_first):
            return messages
        numbers = {event.trial for event in events}
        found = self._context.status(self._name)
        state = {"state": found["state"], "why": found["why"], "best": found.get("best")}
        if state != self._state:
            self._state = state
            messages.append(("state", state))
        if changed := [trial for trial in found["trials"] if trial["number"] in numbers]:
            messages.append(("trials", {"trials": changed}))
        return messages

    def _points(self, reader: StudyReader) -> list[Message]:
        """Return the points after the last known step of each trial; of a trial that began again, all."""
        if self._is_first:
            self._steps = reader.last_steps()
            return []
        self._steps, found = reader.metrics_after(self._steps)
        points = [
            {"trial": number, "step": point.step, "metrics": dict(point.metrics)}
            for number, history in found.items()
            for point in history
        ]
        parts = [points[k : k + _POINTS_IN_A_MESSAGE] for k in range(0, len(points), _POINTS_IN_A_MESSAGE)]
        return [("metrics", as_json({"points": part})) for part in parts]


class ListSource:
    """All sweeps: `sweeps`, with the entries of the list that changed and the names of those that are gone."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._entries: dict[str, dict[str, Any]] = {}
        self._read_at = 0.0
        self._is_first = True

    def close(self) -> None:
        """Nothing is open."""

    def snapshot(self) -> Any:
        """Return nothing: the list is read by its pages."""
        return {}

    def read(self) -> Sequence[Message]:
        """Return the entries that changed; the list is read every two seconds."""
        if time.monotonic() - self._read_at < _LIST_SECONDS:
            return ()
        entries = {entry.values["name"]: entry.values for entry in self._context.listed()}
        self._read_at = time.monotonic()
        changed = [entry for name, entry in entries.items() if self._entries.get(name) != entry]
        gone = sorted(self._entries.keys() - entries.keys())
        self._entries = entries
        if self._is_first or not (changed or gone):
            self._is_first = False
            return ()
        return [("sweeps", {"changed": changed, "gone": gone})]


class LogSource:
    """The log of a sweep or of one trial: `lines` as they come, `end` once nothing more will come."""

    def __init__(self, context: ServiceContext, name: str, trial: int | None) -> None:
        """Raises NoSuchSweep, RequestRefused."""
        self._log = context.log(name, trial, most=_READ_BYTES)
        self._last: deque[str] = deque(maxlen=_SHOWN_LINES)
        self._is_first, self._has_ended, self._name = True, False, name
        self._had_folder = self._log.folder.spec.is_file()

    def close(self) -> None:
        """Close the study."""
        self._log.close()

    def snapshot(self) -> Any:
        """Return the last lines, and whether the log has ended."""
        return {"lines": list(self._last), "ended": self._has_ended}

    def read(self) -> Sequence[Message]:
        """Return what was added."""
        if self._had_folder and not self._log.folder.spec.is_file():
            raise NoSuchSweep(self._name, self._log.folder.root, (), None)
        has_ended = self._log.has_ended()  # asked first, so that its last lines are read
        secrets = secret_values()
        lines = [redact(line, secrets) for line in self._log.new_lines(at_end=has_ended)]
        self._last.extend(lines)
        messages: list[Message] = [("lines", {"lines": lines})] if lines else []
        if has_ended and not self._has_ended:
            messages.append(("end", {}))
        self._has_ended = has_ended
        if self._is_first:
            self._is_first = False
            return ()
        return messages
