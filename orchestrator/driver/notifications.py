"""Notifications by webhook and command: the sweep ended, a trial diverged, or the sweep stalled.

A thread delivers them, so that the driver neither waits for a delivery nor fails with it.
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

from orchestrator.call_retries import retrying
from orchestrator.errors import SpecError, SpecProblem, first_line
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import ProgressView, UpdatesOf
from orchestrator.loopback import client_options
from orchestrator.redaction import redact
from orchestrator.spec.sweep_spec import NotificationKind, Notify, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState, requirements_text
from trainer.results import StepMetrics

RETRY_WAITS = (1.0, 5.0, 20.0)
"""Seconds before the second, third and fourth try, after which the notice is dropped."""
_SECONDS = 10.0
"""Seconds. Timeout of a webhook request."""
_COMMAND_SECONDS = 60.0
"""Seconds. Timeout of the command."""

Notification = Mapping[str, object]
"""`event`, `sweep`, `trial` (or None) and `text`."""


class _NotDelivered(Exception):
    """The receiver did not accept the notice; the message is the reason."""


class NoticeDelivery:
    """Sends each notice to webhook and command in order; failures are collected for `take_failures()`."""

    def __init__(self, url: str | None, command: Sequence[str] | None, waits: Sequence[float] = RETRY_WAITS) -> None:
        self._url, self._command, self._waits = url, command, tuple(waits)
        self._queue: SimpleQueue[Notification | None] = SimpleQueue()
        self._failures: SimpleQueue[str] = SimpleQueue()
        self._closing = threading.Event()
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # below, it logs the address of every request
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self._thread.start()

    def send(self, notice: Notification) -> None:
        """Queue a notice; returns at once."""
        self._queue.put(notice)

    def take_failures(self) -> list[str]:
        """Return the failures since the last call, without secrets."""
        return [self._failures.get() for _ in range(self._failures.qsize())]

    def close(self, timeout: float) -> None:
        """Deliver queued notices for up to `timeout` seconds, then drop the rest."""
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

    def _try(self, receiver: str, notice: Notification, deliver: Callable[[Notification], str | None]) -> None:
        def attempt() -> None:
            if (failure := deliver(notice)) is not None:
                raise _NotDelivered(failure)

        try:
            retrying(self._waits, _NotDelivered, cancelled=self._closing)(attempt)
        except _NotDelivered as error:
            self._failures.put(f"{receiver} did not accept the notice ({notice['event']}): {redact(str(error))}")

    def _post(self, notice: Notification) -> str | None:
        """Post the notice in Slack's format (`text` with &, < and > escaped); return the error, or None."""
        import httpx2

        assert self._url is not None
        text = str(notice["text"]).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        try:
            response = httpx2.post(self._url, json={"text": text}, timeout=_SECONDS, **client_options(self._url))
        except ImportError as error:  # a proxy of a kind whose package is missing
            return f"it cannot be reached ({first_line(error)})"
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:  # the messages may contain the URL
            return f"it cannot be reached ({type(error).__name__})"
        return None if response.is_success else f"it answered {response.status_code}"

    def _run_command(self, notice: Notification) -> str | None:
        """Run the command with the notice as JSON on stdin, event and text in the environment; return the error."""
        assert self._command is not None
        environment = {"PREFSWEEP_EVENT": str(notice["event"]), "PREFSWEEP_TEXT": str(notice["text"])}
        try:
            done = subprocess.run(
                list(self._command),
                input=json.dumps(notice),
                env=os.environ | environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_COMMAND_SECONDS,
                check=False,
                start_new_session=True,  # Ctrl-C must reach only the driver
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {_COMMAND_SECONDS:g} s"
        except OSError as error:
            return f"it could not be started: {error.strerror}"
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        return None if done.returncode == 0 else f"it ended with {done.returncode}{f': {last}' if last else ''}"


def is_webhook_url(url: str) -> bool:
    """Return whether this is an http(s) URL with a host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


_LAST_SECONDS = 15.0
_STOPPED_BY_USER = frozenset({StopKind.INTERRUPTED, StopKind.STOPPED, StopKind.ABANDONED})


def webhook_url(spec: SweepSpec) -> str | None:
    """Return the webhook's URL from the environment; None where none is configured.

    Raises:
        SpecError: the variable is not set or has no URL; the message does not contain its value.
    """
    name = None if spec.notify is None else spec.notify.webhook_env
    if name is None:
        return None
    url = os.environ.get(name, "")
    if is_webhook_url(url):
        return url
    problem = f"the environment variable {name} " + ("has no http(s) URL" if url else "is not set")
    hint = "export it before the sweep, or set notify to null"
    raise SpecError([SpecProblem(spec.name, "notify.webhook_env", problem, hint)])


class NotifyingView:
    """A ProgressView that forwards all calls to another view and sends the configured notices."""

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

    # --- ProgressView --------------------------------------------------------------------------------------------

    def set_activity(self, text: str) -> None:
        """Forward the current stage; counts as progress."""
        self._note_progress()
        self._view.set_activity(text)

    def set_stage_progress(self, done: int, total: int) -> None:
        """Forward how far the current stage is; counts as progress."""
        self._note_progress()
        self._view.set_stage_progress(done, total)

    def log(self, text: str) -> None:
        """Forward a message."""
        self._view.log(text)

    def change_spec(self, spec: SweepSpec, total: int | None) -> None:
        """Pass the call to the view."""
        self._view.change_spec(spec, total)

    def set_total_updates(self, updates_of: UpdatesOf) -> None:
        """Forward the function that returns a trial's total updates."""
        self._view.set_total_updates(updates_of)

    def update_trial(self, record: TrialRecord) -> None:
        """Forward a changed trial; notify where it diverged under this driver."""
        self._note_progress()
        if record.state is TrialState.RUNNING:
            self._running.add(record.number)
        elif record.diverged and record.number in self._running:
            self._send("diverged", f"trial {record.number} of {self._spec.name} {record.reason}", record.number)
        self._view.update_trial(record)

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        """Forward new metrics; counts as progress."""
        self._note_progress()
        self._view.add_metrics(number, metrics)

    def refresh(self) -> None:
        """Notify once where there was no progress for `notify.stalled_minutes`; log failed deliveries."""
        minutes = (self._clock() - self._last_progress) / 60
        if not self._is_stalled and minutes >= self._config.stalled_minutes:
            self._is_stalled = True
            text = f"{self._spec.name} has stalled: no progress of any worker for {minutes:.0f} minutes"
            self._send("stalled", text)
        self._log_failures()
        self._view.refresh()

    def close(self) -> None:
        """Do nothing: the caller that opened the forwarded view closes it."""

    # --- the end -------------------------------------------------------------------------------------------------

    def notify_end(
        self, stop_reason: StopReason | None, best: TrialRecord | None, no_best: str = "no trial completed"
    ) -> None:
        """Notify of the sweep's end (None: by an error) unless a user stopped it; deliver queued notices.

        `no_best`: why there is no best trial, if there is none.
        """
        if stop_reason is None or stop_reason.kind not in _STOPPED_BY_USER:
            ending = "ended by an error" if stop_reason is None else stop_reason.kind.value
            parts = [f"{self._spec.name}: {ending}"]
            if stop_reason is not None and stop_reason.kind is not StopKind.FINISHED and stop_reason.text:
                parts.append(stop_reason.text)
            parts.append(
                no_best
                if best is None
                else _best_text(self._spec, best) + (f" ({best.seeds_text})" if best.seeds else "")
            )
            self._send("finished", "; ".join(parts), None if best is None else best.number)
        self._delivery.close(_LAST_SECONDS)
        self._log_failures()

    # -------------------------------------------------------------------------------------------------------------

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
    """Yield a view that sends the notices of `notify:`, and a function to call with the sweep's stop reason.

    Without that call the sweep counts as ended by an error.

    Raises:
        SpecError: the webhook's URL is missing; raised on entry.
    """
    config = spec.notify
    if config is None:
        yield view, lambda _: None
        return
    notifier = NotifyingView(spec, view, NoticeDelivery(webhook_url(spec), config.command), config)
    reasons: list[StopReason] = []
    try:
        yield notifier, reasons.append
    finally:
        notifier.notify_end(reasons[0] if reasons else None, *_best(folder))


def _best_text(spec: SweepSpec, best: TrialRecord) -> str:
    values = zip(spec.objectives, best.values or (best.value,), strict=False)
    listed = ", ".join(f"{objective.metric} = {value:.4g}" for objective, value in values)
    if spec.also:
        return f"the Pareto front begins with trial {best.number} ({listed})"
    return f"best is trial {best.number} with {listed}"


def _best(folder: SweepFolder) -> tuple[TrialRecord | None, str]:
    """Return the best trial, and why there is none."""
    if not Study.exists(folder):
        return None, "no trial completed"
    with Study.open(folder, read_only=True) as study:
        return study.best(), requirements_text(study.ranked()) or "no trial completed"
