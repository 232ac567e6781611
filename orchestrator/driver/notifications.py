"""Who is told, away from the terminal, that a sweep ended, a trial diverged, or nothing moves any more.

Notices on their way to a webhook and a command, from a thread: nobody waits for them, and they never raise.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from urllib.parse import urlsplit

from orchestrator.errors import Finding, SpecError
from orchestrator.execution.stop_reasons import Stop, StopKind
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import StepsOf, View
from orchestrator.redaction import redact
from orchestrator.spec.sweep_spec import Notice, Notify, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.results import Point

WAITS = (1.0, 5.0, 20.0)
"""Seconds before the second, third and fourth try; then the notice is given up."""
_SECONDS = 10.0
_COMMAND_SECONDS = 60.0

Note = Mapping[str, object]
"""`event`, `sweep`, `trial` (or None) and `text`."""


class Delivery:
    """Sends each notice to each receiver in order. What went wrong waits in `troubles()` for whoever may print."""

    def __init__(self, url: str | None, command: Sequence[str] | None, waits: Sequence[float] = WAITS) -> None:
        self._url, self._command, self._waits = url, command, tuple(waits)
        self._queue: SimpleQueue[Note | None] = SimpleQueue()
        self._troubles: SimpleQueue[str] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self._thread.start()

    def send(self, notice: Note) -> None:
        """Returns at once. `notice` has `event`, `sweep`, `trial` (or None) and `text`."""
        self._queue.put(notice)

    def troubles(self) -> list[str]:
        """What was given up since the last call, in words without secrets."""
        return [self._troubles.get() for _ in range(self._troubles.qsize())]

    def close(self, timeout: float) -> None:
        """Send what is left for up to `timeout` seconds; later tries are no longer waited for."""
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._closing.set()
            self._troubles.put("a notice was not delivered before the sweep's end")

    def _run(self) -> None:
        while (notice := self._queue.get()) is not None:
            if self._url is not None:
                self._try("the webhook", notice, self._post)
            if self._command is not None:
                self._try("the command", notice, self._call)

    def _try(self, whom: str, notice: Note, deliver: Callable[[Note], str | None]) -> None:
        for wait in (*self._waits, None):
            trouble = deliver(notice)
            if trouble is None:
                return
            if wait is None or self._closing.wait(wait):
                self._troubles.put(f"{whom} did not take the notice ({notice['event']}): {redact(trouble)}")
                return

    def _post(self, notice: Note) -> str | None:
        """Slack's form: one JSON object with `text`, in which &, < and > are escaped. What went wrong, or None."""
        assert self._url is not None
        text = str(notice["text"]).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        body = json.dumps({"text": text}).encode()
        try:
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=_SECONDS):
                return None
        except urllib.error.HTTPError as error:
            return f"it answered {error.code}"
        except urllib.error.URLError as error:
            return f"it cannot be reached ({type(error.reason).__name__})"
        except (OSError, http.client.HTTPException, ValueError) as error:  # their words may hold the address
            return f"it cannot be reached ({type(error).__name__})"

    def _call(self, notice: Note) -> str | None:
        """The command reads the notice as JSON; event and text are in its environment too."""
        assert self._command is not None
        environment = {"PREFSWEEP_EVENT": str(notice["event"]), "PREFSWEEP_TEXT": str(notice["text"])}
        try:
            done = subprocess.run(
                list(self._command),
                input=json.dumps(notice),
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
                start_new_session=True,  # Ctrl-C is for the sweep
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {_COMMAND_SECONDS:g} s"
        except OSError as error:
            return f"it could not be started: {error.strerror}"
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        return None if done.returncode == 0 else f"it ended with {done.returncode}{f': {last}' if last else ''}"


def is_address(url: str) -> bool:
    """Whether a webhook can be posted to this."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


_LAST_SECONDS = 15.0
_BY_HAND = frozenset({StopKind.INTERRUPTED, StopKind.STOPPED})


def webhook(spec: SweepSpec) -> str | None:
    """The webhook's address, from the environment; SpecError, without the address, where it is missing or none."""
    name = None if spec.notify is None else spec.notify.webhook_env
    if name is None:
        return None
    url = os.environ.get(name, "")
    if is_address(url):
        return url
    problem = f"the environment variable {name} " + ("holds no http(s) address" if url else "is not set")
    hint = "export it before the sweep, or set notify to null"
    raise SpecError([Finding(spec.name, "notify.webhook_env", problem, hint)])


class Notifier:
    """A View that passes everything on to another, and sends the notices that the sweep asks for."""

    def __init__(
        self,
        spec: SweepSpec,
        view: View,
        delivery: Delivery,
        config: Notify,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._view, self._delivery, self._config, self._clock = spec, view, delivery, config, clock
        self._running: set[int] = set()
        self._moved_at = clock()
        self._stalled = False

    # --- what the engine tells -----------------------------------------------------------------------------------

    def stage(self, text: str) -> None:
        """What the sweep is busy with; a sign of life."""
        self._moved()
        self._view.stage(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._view.say(text)

    def expect(self, steps: StepsOf) -> None:
        """The number of updates of a trial by its params."""
        self._view.expect(steps)

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial began or ended; one that diverged under this driver is told."""
        self._moved()
        if record.state is TrialState.RUNNING:
            self._running.add(record.number)
        elif record.diverged and record.number in self._running:
            self._tell("diverged", f"trial {record.number} of {self._spec.name} {record.reason}", record.number)
        self._view.trial_changed(record)

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics; the surest sign of life."""
        self._moved()
        self._view.points(number, points)

    def tick(self) -> None:
        """Time passed: has anything moved?"""
        minutes = (self._clock() - self._moved_at) / 60
        if not self._stalled and minutes >= self._config.stalled_minutes:
            self._stalled = True
            text = f"{self._spec.name} has stalled: no sign of any worker for {minutes:.0f} minutes"
            self._tell("stalled", text)
        self._complain()
        self._view.tick()

    def close(self) -> None:
        """Not ours to close: whoever opened the view closes it."""

    # --- the end -------------------------------------------------------------------------------------------------

    def ended(self, how: Stop | None, best: TrialRecord | None) -> None:
        """Tell how the sweep ended (None: by an error), unless a person stopped it; deliver what is left."""
        if how is None or how.kind not in _BY_HAND:
            word = "ended by an error" if how is None else how.kind.value
            words = [f"{self._spec.name}: {word}"]
            if how is not None and how.kind is not StopKind.FINISHED and how.text:
                words.append(how.text)
            words.append(
                "no trial completed"
                if best is None
                else f"best is trial {best.number} with {self._spec.goal.metric} = {best.value:.4g}"
            )
            self._tell("finished", "; ".join(words), None if best is None else best.number)
        self._delivery.close(_LAST_SECONDS)
        self._complain()

    # --- inside --------------------------------------------------------------------------------------------------

    def _moved(self) -> None:
        self._moved_at, self._stalled = self._clock(), False

    def _tell(self, event: Notice, text: str, trial: int | None = None) -> None:
        if event in self._config.on:
            self._delivery.send({"event": event, "sweep": self._spec.name, "trial": trial, "text": redact(text)})

    def _complain(self) -> None:
        for trouble in self._delivery.troubles():
            self._view.say(f"notify: {trouble}")


@contextmanager
def notifying(folder: SweepFolder, spec: SweepSpec, view: View) -> Generator[tuple[View, Callable[[Stop], None]]]:
    """A view that notifies as `notify:` says, and what to call when it is over; without that call, an error ended it.

    SpecError, before anything else, where the webhook's address is missing.
    """
    config = spec.notify
    if config is None:
        yield view, lambda _: None
        return
    notifier = Notifier(spec, view, Delivery(webhook(spec), config.command), config)
    how: list[Stop] = []
    try:
        yield notifier, how.append
    finally:
        notifier.ended(how[0] if how else None, _best(folder))


def _best(folder: SweepFolder) -> TrialRecord | None:
    if not Study.exists(folder):
        return None
    with Study.open(folder) as study:
        return study.best()
