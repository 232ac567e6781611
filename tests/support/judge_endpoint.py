"""A small OpenAI-compatible server on this machine, which judges as a test tells it to and keeps what it was asked."""

import json
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.http_server import SilentHandler, serving
from tests.support.processes import LIMIT_SECONDS


@dataclass(frozen=True)
class Shown:
    """What one request shows to the judge."""

    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Raw:
    """An answer that is none of the usual ones."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


HANG = "hang"
DRIP = "drip"
Action = str | int | Raw | dict[str, Any]
"""A completion's text, a status, raw bytes, or fields of the completion's choice."""
_PARTS = re.compile(
    r"<prompt>\n(.*)\n</prompt>\n\n<answer_a>\n(.*)\n</answer_a>\n\n<answer_b>\n(.*)\n</answer_b>", re.DOTALL
)


@dataclass
class FakeJudge:
    """Answers each request with what `decide` makes of it and of the number of the same requests before."""

    decide: Callable[[Shown, int], Action] = lambda shown, _: "[[C]]"
    asked: list[Shown] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    url: str = ""
    let_go: threading.Event = field(default_factory=threading.Event)
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict[str, Any], key: str | None) -> Action:
        found = _PARTS.search(body["messages"][-1]["content"])
        assert found
        shown = Shown(*found.groups())
        with self._lock:
            before = self.asked.count(shown)
            self.asked.append(shown)
            self.bodies.append(body)
            self.keys.append(key)
        return self.decide(shown, before)

    @contextmanager
    def busy(self) -> Generator[None]:
        with self._lock:
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        yield
        with self._lock:
            self._now -= 1


def longer(shown: Shown, _: int = 0) -> str:
    """A judge without a position bias that likes length."""
    if len(shown.first) == len(shown.second):
        return "[[C]]"
    return "[[A]]" if len(shown.first) > len(shown.second) else "[[B]]"


@contextmanager
def serve(judge: FakeJudge) -> Generator[FakeJudge]:
    class Handler(SilentHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with judge.busy():
                self._act(judge.take(body, self.headers.get("Authorization")))

        def _act(self, action: Action) -> None:
            if action == HANG:
                judge.let_go.wait(LIMIT_SECONDS)
                return
            if action == DRIP:
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    if judge.let_go.is_set():
                        return
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            if isinstance(action, int):
                action = Raw(action, b"{}")
            if not isinstance(action, Raw):
                choice = {"message": {"role": "assistant", "content": action}, "finish_reason": "stop"}
                choice |= action if isinstance(action, dict) else {}
                usage = {"prompt_tokens": 100, "completion_tokens": 5}
                action = Raw(200, json.dumps({"choices": [choice], "usage": usage}).encode())
            self.send_response(action.status)
            for name, value in action.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(action.body)))
            self.end_headers()
            self.wfile.write(action.body)

        def handle(self) -> None:
            try:
                super().handle()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the asker was killed, or waits no longer

    with serving(Handler) as address:
        judge.url = f"{address}/v1"
        try:
            yield judge
        finally:
            judge.let_go.set()
