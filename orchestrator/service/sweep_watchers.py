"""`Watchers`: what changes in a sweep is read once, however many people watch it.

A thread for each sweep that is watched reads what is new, twice a second, and appends it to an `EventLog` as
server-sent events. Those who watch share the log's bytes and keep nothing but their position in it: one that reads
slowly costs no memory and delays no other. Who falls behind the oldest message, or comes back with the position of an
earlier log, gets the message `reload`: what came before is to be read again from the API, what follows comes here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from orchestrator.errors import ExitCode, NoSuchSweep, OrchestrateError, first_line
from orchestrator.redaction import redact

Message = tuple[str, Any]
"""Kind of an event and its data as JSON."""
RELOAD = "reload"
POLL_SECONDS = 0.5
"""Between two readings of what is watched."""
_LINGER_SECONDS = 30.0
"""How long a sweep is still watched after the last one has left, for those who come back."""
_LOG_BYTES = 2 << 20
_AT_A_TIME = 32
_QUIET_SECONDS = 15.0
"""A stream without news gets a comment this often, so that connections that have ended are noticed."""
_MOST_LOGS = 64
_MOST_READERS = 500


class TooManyStreams(OrchestrateError):
    """The service has as many open streams as it may have."""

    code = ExitCode.REFUSED

    def __init__(self) -> None:
        super().__init__(f"{_MOST_READERS} streams or {_MOST_LOGS} watched sweeps are open, the most there may be")


class Source(Protocol):
    """What is watched."""

    def read(self) -> Sequence[Message]:
        """Return what is new since the last call; the first call only notes what there is."""
        ...

    def snapshot(self) -> Any:
        """Return the data of `reload` messages: what there is at the last call of `read`."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class EventLog:
    """The last messages of one source as server-sent events, in memory, for any number of readers."""

    def __init__(self, most_bytes: int = _LOG_BYTES) -> None:
        """`most_bytes`: of the messages that are kept; the newest one is kept in any case."""
        self._most, self._bytes = most_bytes, 0
        self._token = secrets.token_hex(4)
        self._guard = threading.Lock()
        self._messages: deque[tuple[int, bytes]] = deque()
        self._end = 0
        self._snapshot: Any = None
        self._readers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def publish(self, messages: Sequence[Message], snapshot: Any) -> None:
        """Append messages; `snapshot` is the state after them."""
        with self._guard:
            for kind, data in messages:
                self._end += 1
                encoded = self._encode(self._end, kind, data)
                self._messages.append((self._end, encoded))
                self._bytes += len(encoded)
            while self._bytes > self._most and len(self._messages) > 1:
                self._bytes -= len(self._messages.popleft()[1])
            self._snapshot = snapshot
        if messages:
            self.wake()

    def wake(self) -> None:
        """Let the readers look."""
        with self._guard:
            for woken, loop in self._readers.items():
                loop.call_soon_threadsafe(woken.set)

    def position(self, event_id: str) -> int | None:
        """Return the position of a message that this log still continues after; None of any other id."""
        token, _, number = event_id.partition("-")
        if token != self._token or not number.isdecimal():
            return None
        with self._guard:
            oldest = self._messages[0][0] if self._messages else self._end + 1
            return int(number) if oldest - 1 <= int(number) <= self._end else None

    def after(self, position: int | None) -> tuple[int, list[bytes]]:
        """Return the next messages after a position, and the position after them.

        With no position, or one that is older than the oldest message, it is one `reload`.
        """
        with self._guard:
            oldest = self._messages[0][0] if self._messages else self._end + 1
            if position is None or position < oldest - 1:
                return self._end, [self._encode(self._end, RELOAD, self._snapshot)]
            first = position - oldest + 1
            found = [self._messages[k][1] for k in range(first, min(first + _AT_A_TIME, len(self._messages)))]
            return position + len(found), found

    @contextmanager
    def reader(self) -> Generator[asyncio.Event]:
        """Yield an event that is set when there are new messages."""
        woken, loop = asyncio.Event(), asyncio.get_running_loop()
        with self._guard:
            self._readers[woken] = loop
        try:
            yield woken
        finally:
            with self._guard:
                del self._readers[woken]

    @property
    def has_readers(self) -> bool:
        """Whether anybody watches."""
        with self._guard:
            return bool(self._readers)

    def _encode(self, number: int, kind: str, data: Any) -> bytes:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return f"id: {self._token}-{number}\nevent: {kind}\ndata: {text}\n\n".encode()


class _Watcher:
    """The thread that reads one source."""

    def __init__(self, source: Source) -> None:
        self.log, self._source = EventLog(), source
        self.ready, self._ends = threading.Event(), threading.Event()
        self.gone = False
        """Whether what it watched exists no more."""
        self._left_at = time.monotonic()
        self._problem = ""
        self.thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def is_needed(self) -> bool:
        if self.log.has_readers:
            self._left_at = time.monotonic()
        return time.monotonic() - self._left_at < _LINGER_SECONDS

    def end(self) -> None:
        self._ends.set()

    def close(self) -> None:
        """Close the source of a watcher that was never started."""
        self._source.close()

    @property
    def has_ended(self) -> bool:
        return self._ends.is_set()

    def _run(self) -> None:
        try:
            while not self._ends.is_set() and self.is_needed():
                self._step()
                if not self.ready.is_set():
                    self.ready.set()
                    self.log.wake()
                if self.gone:
                    break
                self._ends.wait(POLL_SECONDS)
        finally:
            self._ends.set()
            self.ready.set()
            self.log.wake()
            self._source.close()

    def _step(self) -> None:
        """Read once; a database or disk that refuses is reported once and asked again."""
        try:
            messages = self._source.read()
        except NoSuchSweep as error:
            self.gone = True
            self.log.publish([("gone", {"detail": redact(first_line(error))})], None)
            return
        except (OrchestrateError, OSError) as error:
            problem = redact(first_line(error))
            shown = [] if problem == self._problem else [("problem", {"detail": problem})]
            self._problem = problem
            self.log.publish(shown, self._source.snapshot())
            return
        if self._problem:  # what was read before the problem may not have been published
            messages = [(RELOAD, self._source.snapshot())]
        self._problem = ""
        self.log.publish(messages, self._source.snapshot())


class Watchers:
    """The sources that are watched at present, one thread and one log for each."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._watchers: dict[Hashable, _Watcher] = {}
        self._readers = 0

    @property
    def readers(self) -> int:
        """Open streams."""
        return self._readers

    def close(self) -> None:
        """End all threads."""
        with self._guard:
            watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.end()
        for watcher in watchers:
            watcher.thread.join()

    def watch(self, key: Hashable, source: Callable[[], Source]) -> _Watcher:
        """Return the watcher of a source, begun where it is not watched yet. Raises TooManyStreams."""
        with self._guard:
            self._watchers = {each: found for each, found in self._watchers.items() if not found.has_ended}
            if self._readers >= _MOST_READERS or (len(self._watchers) >= _MOST_LOGS and key not in self._watchers):
                raise TooManyStreams
            if key in self._watchers:
                return self._watchers[key]
        watcher = _Watcher(source())  # it may wait for a database, and others must not
        with self._guard:
            other = self._watchers.setdefault(key, watcher)
            if other is watcher:
                watcher.thread.start()
        if other is not watcher:
            watcher.close()
        return other

    async def stream(
        self, watcher: _Watcher, last_id: str, is_valid: Callable[[], bool], quiet: float = _QUIET_SECONDS
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events after the message with this id, until what is watched is gone.

        Args:
            watcher: of `watch`.
            last_id: id of the last message that the client has, as of the header Last-Event-ID; "" for none.
            is_valid: whether the client may still read; asked every `quiet` seconds.
            quiet: seconds without a message after which a comment is sent.
        """
        self._readers += 1
        try:
            with watcher.log.reader() as woken:
                position, checked = watcher.log.position(last_id), time.monotonic()
                while True:
                    if time.monotonic() - checked >= quiet:
                        if not is_valid():
                            return
                        checked = time.monotonic()
                    woken.clear()
                    has_ended = watcher.has_ended
                    if watcher.ready.is_set():
                        position, messages = watcher.log.after(position)
                        for message in messages:
                            yield message
                        if messages:
                            continue
                    if has_ended:
                        return
                    try:
                        await asyncio.wait_for(woken.wait(), quiet)
                    except TimeoutError:
                        yield b": nothing new\n\n"
        finally:
            self._readers -= 1
