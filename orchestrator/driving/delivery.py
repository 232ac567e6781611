"""Notices on their way to a webhook and a command, from a thread: nobody waits for them, and they never raise."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from urllib.parse import urlsplit

from orchestrator.tracking.secrets import redact

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
