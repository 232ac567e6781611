"""Warnings of the trainer on their way from a worker process to the user: each is told once in a sweep.

They say what a trial does otherwise than its file or its model's configuration says, for instance which dropout was
switched off in the model. `captured_warnings` is the worker's side, `WarningLog` the driver's.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.interfaces import SWEEP
from orchestrator.redaction import redact

if TYPE_CHECKING:
    from orchestrator.interfaces import ProgressView, TrackingSink
    from orchestrator.study.reader import StudyReader

WARNING = "warning"
"""Kind of these events in the history."""
WARNINGS_TAG = "warnings"
"""Of the parent run."""
TRAINER_LOGGER = logging.getLogger("trainer")


class _ListHandler(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(redact(record.getMessage()))
        if not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)  # a logger with a handler of its own would no longer write to stderr


@contextmanager
def captured_warnings() -> Generator[list[str]]:
    """Give what the trainer warns of meanwhile; it goes to the process's log as before."""
    messages: list[str] = []
    handler = _ListHandler(messages)
    TRAINER_LOGGER.addHandler(handler)
    try:
        yield messages
    finally:
        TRAINER_LOGGER.removeHandler(handler)


def told_warnings(study: StudyReader) -> list[str]:
    """Every warning of the sweep so far, in order."""
    return [event.text for event in study.events() if event.kind == WARNING]


class WarningLog:
    """Puts each new warning into the output, the history and a tag of the parent run."""

    def __init__(self, study: StudyReader, sink: TrackingSink, view: ProgressView) -> None:
        self._study, self._sink, self._view = study, sink, view
        self._told = told_warnings(study)

    def tell(self, messages: Iterable[str], trial: int | None) -> None:
        """Tell those that no trial has brought yet; `trial` None: they are of the SFT stage."""
        new = [message for message in dict.fromkeys(messages) if message not in self._told]
        for message in new:
            self._study.add_event(WARNING, message, trial)
            self._view.log(f"{'sft' if trial is None else f'trial {trial}'}: {message}")
        if new:
            self._told += new
            self._sink.set_tags(SWEEP, {WARNINGS_TAG: "\n".join(self._told)})
