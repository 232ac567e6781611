"""A blocking call as a generator: it runs in a thread of its own and stands still while its consumer has the word."""

from __future__ import annotations

from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Abandoned(BaseException):
    """Nobody wants what comes next; raised where the call gives something, so that it unwinds."""


class _Exchange(Generic[T]):
    """The two sides take turns: `given` hands items over (None: the end), `go_on` gives the turn back."""

    def __init__(self) -> None:
        self.given: SimpleQueue[T | None] = SimpleQueue()
        self.go_on = Semaphore(0)
        self.closed = False
        self.failure: BaseException | None = None

    def give(self, item: T) -> None:
        self.given.put(item)
        self.go_on.acquire()
        if self.closed:
            raise Abandoned

    def run(self, call: Callable[[Callable[[T], None]], object]) -> None:
        try:
            call(self.give)
        except Abandoned:
            self.failure = None
        except BaseException as why:  # noqa: BLE001 - raised again in the consumer's thread
            self.failure = why
        self.given.put(None)


def handed_over(call: Callable[[Callable[[T], None]], object], name: str) -> Generator[T, None, None]:
    """What `call` gives (it is passed the function to give with), one after the other.

    An exception in the call is raised here. Closing the generator raises Abandoned in the call and waits for its end.
    """
    exchange: _Exchange[T] = _Exchange()
    thread = Thread(target=exchange.run, args=(call,), name=name, daemon=True)
    thread.start()
    try:
        while (item := exchange.given.get()) is not None:
            yield item
            exchange.go_on.release()
    finally:
        exchange.closed = True
        exchange.go_on.release()
        thread.join()
    if exchange.failure is not None:
        raise exchange.failure
