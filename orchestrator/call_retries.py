"""Retries with listed waits, on tenacity."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
)


def retrying(
    waits: Sequence[float],
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
    *,
    cancelled: threading.Event | None = None,
    on_retry: Callable[[BaseException], None] | None = None,
) -> Retrying:
    """Return a tenacity `Retrying`: call it with a function to run that with retries.

    It retries after each of `waits` (seconds) and then raises the last error.

    Args:
        errors: exceptions after which the call is retried; others are raised at once.
        cancelled: once set, the current wait ends and one last try is made.
        on_retry: receives each error that is followed by a retry.
    """
    event = cancelled or threading.Event()

    def wait(state: RetryCallState) -> float:
        return waits[state.attempt_number - 1] if state.attempt_number <= len(waits) else 0.0

    def before_sleep(state: RetryCallState) -> None:
        if on_retry is not None and state.outcome is not None and (error := state.outcome.exception()) is not None:
            on_retry(error)

    return Retrying(
        retry=retry_if_exception_type(errors),
        wait=wait,
        stop=stop_any(stop_after_attempt(len(waits) + 1), stop_when_event_set(event)),
        sleep=sleep_using_event(event),
        before_sleep=before_sleep,
        reraise=True,
    )
