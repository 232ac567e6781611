"""A real Chromium driven over its own DevTools pipe: pictures, and tests that must see what a person sees."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    # On a busy machine a page is not slowed as one that nobody sees, and keys that come before its first picture count.
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--allow-pre-commit-input",
)

LIMIT_SECONDS = 600
"""Seconds to wait for a page or an answer; a busy machine takes long to draw charts."""
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
"""A promise that is kept once the page has been painted as it is now, so that its observers have run."""

# The browser reads commands from descriptor 3 and writes answers to descriptor 4, whatever numbers ours have.
_WIRE = """
import fcntl, os, sys
high = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def installed() -> str | None:
    """The browser's command; None where there is none."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@dataclass
class Seen:
    """What a page did: console errors and warnings, exceptions, and requests for anything but itself and data: URLs."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session
        self.seen = Seen()
        self.url = ""
        for domain in ("Page", "Runtime", "Log", "Network", "Inspector"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def close(self) -> None:
        """Close the tab. Open ones keep their connections to a server, of which a browser has six."""
        target = self.call("Target.getTargetInfo")["targetInfo"]["targetId"]
        self._browser.call("Target.closeTarget", {"targetId": target})

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, params, self._session, self._on_event)

    def look(self, url: str, *, width: int, height: int = 900, dark: bool = False, ready: str = "true") -> None:
        """Open `url` at this width and wait until the JavaScript expression `ready` holds."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.url = url
        if problem := self.call("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {problem}")
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            if self.run(f"document.readyState === 'complete' && location.href !== 'about:blank' && Boolean({ready})"):
                self.run(PAINTED)
                return
            time.sleep(0.1)
        raise TimeoutError(f"{url} was never ready: {self.seen.errors}")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def picture(self, to: Path, *, whole: bool = True) -> None:
        """A PNG of the page, all of it or what is seen without scrolling."""
        more: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            more = {"captureBeyondViewport": True, "clip": clip}
        shot = self.call("Page.captureScreenshot", format="png", **more)
        to.write_bytes(base64.b64decode(shot["data"]))

    def printed(self, to: Path) -> None:
        """A PDF, as the print dialogue makes it."""
        to.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))

    def _on_event(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.seen.errors.append(json.dumps(params["exceptionDetails"])[:500])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.seen.errors.append(json.dumps(params["args"])[:500])
            case "Inspector.targetCrashed":
                raise RuntimeError(f"{self.url}: the page's process has crashed")
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.seen.errors.append(json.dumps(params["entry"])[:500])
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("data:", "blob:", "about:")) and url.split("#")[0] != self.url.split("#")[0]:
                    self.seen.requests.append(url)
            case _:
                pass


class Chromium:
    """A browser process; see `browser()`."""

    def __init__(self, process: subprocess.Popen[bytes], out: int, into: int) -> None:
        self._process, self._out, self._into = process, out, into
        self._next = 0
        self._buffer = b""

    def page(self) -> Page:
        """A new tab."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return Page(self, session)

    def call(
        self, method: str, params: dict[str, Any], session: str | None = None, on_event: Any = None
    ) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way go to `on_event`."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._into, data) :]
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if on_event is not None and "method" in answer and answer.get("sessionId") == session:
                on_event(answer)

    def _read(self, deadline: float, method: str) -> dict[str, Any]:
        """Return the next message; events of other tabs, which may come for ever, do not move the deadline."""
        while b"\0" not in self._buffer or time.monotonic() > deadline:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                raise TimeoutError(f"Chromium does not answer {method}")
            got = os.read(self._out, 1 << 20)
            if not got:
                raise RuntimeError("Chromium has gone")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


@contextmanager
def browser() -> Generator[Chromium]:
    """A Chromium with an empty profile, gone afterwards."""
    command = installed()
    if command is None:
        raise SystemExit("no Chromium on the PATH")
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [command, *FLAGS, f"--user-data-dir={profile}"]
        wired = [sys.executable, "-c", _WIRE, str(to_read), str(from_write), *words]
        process = subprocess.Popen(
            wired, pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Chromium(process, from_read, to_write)
        finally:
            os.close(to_write)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_read)
