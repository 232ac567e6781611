"""Warnings of the trainer, carried from the worker process to the user; each is reported once per sweep.

They name where a trial differs from its file or its model's configuration, for instance a dropout that was switched
off. Workers use `captured_warnings`, the driver uses `WarningLog`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.interfaces import SWEEP_RUN
from orchestrator.redaction import redact

if TYPE_CHECKING:
    from orchestrator.interfaces import ProgressView, TrackingSink
    from orchestrator.study.reader import StudyReader

WARNING = "warning"
"""Event kind in the history."""
WARNINGS_TAG = "warnings"
"""Tag of the parent run."""
TRAINER_LOGGER = logging.getLogger("trainer")


class _ListHandler(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message, with secrets masked; print it where no other handler does."""
        self._messages.append(redact(record.getMessage()))
        if not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)  # a logger with its own handler no longer writes to stderr


@contextmanager
def captured_warnings() -> Generator[list[str]]:
    """Yield a list that collects the trainer's warnings; they still go to the process's log."""
    messages: list[str] = []
    handler = _ListHandler(messages)
    TRAINER_LOGGER.addHandler(handler)
    try:
        yield messages
    finally:
        TRAINER_LOGGER.removeHandler(handler)


def recorded_warnings(study: StudyReader) -> list[str]:
    """Return all warnings of the sweep so far, in order."""
    return [event.text for event in study.events() if event.kind == WARNING]


class WarningLog:
    """Writes each new warning to the output, the history and a tag of the parent run."""

    def __init__(self, study: StudyReader, sink: TrackingSink, view: ProgressView) -> None:
        self._study, self._sink, self._view = study, sink, view
        self._reported = recorded_warnings(study)

    def report(self, messages: Iterable[str], trial: int | None) -> None:
        """Write those not reported yet; `trial` is None for the SFT stage."""
        new = [message for message in dict.fromkeys(messages) if message not in self._reported]
        for message in new:
            self._study.add_event(WARNING, message, trial)
            self._view.log(f"{'sft' if trial is None else f'trial {trial}'}: {message}")
        if new:
            self._reported += new
            self._sink.set_tags(SWEEP_RUN, {WARNINGS_TAG: "\n".join(self._reported)})
