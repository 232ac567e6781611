"""Notifications by webhook and command: a sweep ended, a trial diverged, or nothing progresses any more.

A thread delivers them: nothing waits for a delivery, and a failed one raises nothing in the driver.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from urllib.parse import urlsplit

from orchestrator.errors import Finding, SpecError
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import ProgressView, UpdatesOf
from orchestrator.redaction import redact
from orchestrator.spec.sweep_spec import NotificationKind, Notify, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.results import StepMetrics

RETRY_WAITS = (1.0, 5.0, 20.0)
"""Seconds before the second, third and fourth try; then the notice is given up."""
_SECONDS = 10.0
_COMMAND_SECONDS = 60.0

Notice = Mapping[str, object]
"""`event`, `sweep`, `trial` (or None) and `text`."""


class NoticeDelivery:
    """Sends each notice to each receiver in order. What went wrong waits in `take_failures()` for whoever may print."""

    def __init__(self, url: str | None, command: Sequence[str] | None, waits: Sequence[float] = RETRY_WAITS) -> None:
        self._url, self._command, self._waits = url, command, tuple(waits)
        self._queue: SimpleQueue[Notice | None] = SimpleQueue()
        self._failures: SimpleQueue[str] = SimpleQueue()
        self._closing = threading.Event()
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # below, it logs the address of every request
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self._thread.start()

    def send(self, notice: Notice) -> None:
        """Returns at once. `notice` has `event`, `sweep`, `trial` (or None) and `text`."""
        self._queue.put(notice)

    def take_failures(self) -> list[str]:
        """What was given up since the last call, in words without secrets."""
        return [self._failures.get() for _ in range(self._failures.qsize())]

    def close(self, timeout: float) -> None:
        """Send what is left for up to `timeout` seconds; later tries are no longer waited for."""
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._closing.set()
            self._failures.put("a notice was not delivered before the sweep's end")

    def _run(self) -> None:
        while (notice := self._queue.get()) is not None:
            if self._url is not None:
                self._try("the webhook", notice, self._post)
            if self._command is not None:
                self._try("the command", notice, self._run_command)

    def _try(self, whom: str, notice: Notice, deliver: Callable[[Notice], str | None]) -> None:
        for wait in (*self._waits, None):
            failure = deliver(notice)
            if failure is None:
                return
            if wait is None or self._closing.wait(wait):
                self._failures.put(f"{whom} did not take the notice ({notice['event']}): {redact(failure)}")
                return

    def _post(self, notice: Notice) -> str | None:
        """Slack's form: one JSON object with `text`, in which &, < and > are escaped. What went wrong, or None."""
        import httpx2

        assert self._url is not None
        text = str(notice["text"]).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        try:
            response = httpx2.post(self._url, json={"text": text}, timeout=_SECONDS)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:  # their words may hold the address
            return f"it cannot be reached ({type(error).__name__})"
        return None if response.is_success else f"it answered {response.status_code}"

    def _run_command(self, notice: Notice) -> str | None:
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


def is_webhook_url(url: str) -> bool:
    """Whether a webhook can be posted to this."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


_LAST_SECONDS = 15.0
_STOPPED_BY_USER = frozenset({StopKind.INTERRUPTED, StopKind.STOPPED})


def webhook_url(spec: SweepSpec) -> str | None:
    """The webhook's address, from the environment; SpecError, without the address, where it is missing or none."""
    name = None if spec.notify is None else spec.notify.webhook_env
    if name is None:
        return None
    url = os.environ.get(name, "")
    if is_webhook_url(url):
        return url
    problem = f"the environment variable {name} " + ("holds no http(s) address" if url else "is not set")
    hint = "export it before the sweep, or set notify to null"
    raise SpecError([Finding(spec.name, "notify.webhook_env", problem, hint)])


class NotifyingView:
    """A ProgressView that passes everything on to another, and sends the notices that the sweep asks for."""

    def __init__(
        self,
        spec: SweepSpec,
        view: ProgressView,
        delivery: NoticeDelivery,
        config: Notify,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._view, self._delivery, self._config, self._clock = spec, view, delivery, config, clock
        self._running: set[int] = set()
        self._last_progress = clock()
        self._is_stalled = False

    # --- what the engine tells -----------------------------------------------------------------------------------

    def set_stage(self, text: str) -> None:
        """What the sweep is busy with; a sign of life."""
        self._note_progress()
        self._view.set_stage(text)

    def log(self, text: str) -> None:
        """A line that stays."""
        self._view.log(text)

    def set_total_updates(self, updates_of: UpdatesOf) -> None:
        """The number of updates of a trial by its params."""
        self._view.set_total_updates(updates_of)

    def update_trial(self, record: TrialRecord) -> None:
        """A trial began or ended; one that diverged under this driver is told."""
        self._note_progress()
        if record.state is TrialState.RUNNING:
            self._running.add(record.number)
        elif record.diverged and record.number in self._running:
            self._send("diverged", f"trial {record.number} of {self._spec.name} {record.reason}", record.number)
        self._view.update_trial(record)

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        """New metrics; the surest sign of life."""
        self._note_progress()
        self._view.add_metrics(number, metrics)

    def refresh(self) -> None:
        """Time passed: has anything moved?"""
        minutes = (self._clock() - self._last_progress) / 60
        if not self._is_stalled and minutes >= self._config.stalled_minutes:
            self._is_stalled = True
            text = f"{self._spec.name} has stalled: no sign of any worker for {minutes:.0f} minutes"
            self._send("stalled", text)
        self._log_failures()
        self._view.refresh()

    def close(self) -> None:
        """Not ours to close: whoever opened the view closes it."""

    # --- the end -------------------------------------------------------------------------------------------------

    def notify_end(self, stop_reason: StopReason | None, best: TrialRecord | None) -> None:
        """Tell how the sweep ended (None: by an error), unless a person stopped it; deliver what is left."""
        if stop_reason is None or stop_reason.kind not in _STOPPED_BY_USER:
            word = "ended by an error" if stop_reason is None else stop_reason.kind.value
            words = [f"{self._spec.name}: {word}"]
            if stop_reason is not None and stop_reason.kind is not StopKind.FINISHED and stop_reason.text:
                words.append(stop_reason.text)
            words.append(
                "no trial completed"
                if best is None
                else f"best is trial {best.number} with {self._spec.goal.metric} = {best.value:.4g}"
            )
            self._send("finished", "; ".join(words), None if best is None else best.number)
        self._delivery.close(_LAST_SECONDS)
        self._log_failures()

    # --- inside --------------------------------------------------------------------------------------------------

    def _note_progress(self) -> None:
        self._last_progress, self._is_stalled = self._clock(), False

    def _send(self, event: NotificationKind, text: str, trial: int | None = None) -> None:
        if event in self._config.on:
            self._delivery.send({"event": event, "sweep": self._spec.name, "trial": trial, "text": redact(text)})

    def _log_failures(self) -> None:
        for failure in self._delivery.take_failures():
            self._view.log(f"notify: {failure}")


@contextmanager
def notify_events(
    folder: SweepFolder, spec: SweepSpec, view: ProgressView
) -> Generator[tuple[ProgressView, Callable[[StopReason], None]]]:
    """A view that notifies as `notify:` says, and what to call when it is over; without that call, an error ended it.

    SpecError, before anything else, where the webhook's address is missing.
    """
    config = spec.notify
    if config is None:
        yield view, lambda _: None
        return
    notifier = NotifyingView(spec, view, NoticeDelivery(webhook_url(spec), config.command), config)
    how: list[StopReason] = []
    try:
        yield notifier, how.append
    finally:
        notifier.notify_end(how[0] if how else None, _best(folder))


def _best(folder: SweepFolder) -> TrialRecord | None:
    if not Study.exists(folder):
        return None
    with Study.open(folder) as study:
        return study.best()
