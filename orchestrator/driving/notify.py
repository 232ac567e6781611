"""Who is told, away from the terminal, that a sweep ended, a trial diverged, or nothing moves any more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from orchestrator.driving.delivery import Delivery, is_address
from orchestrator.engine.stopping import Stop, StopKind
from orchestrator.engine.view import StepsOf, View
from orchestrator.errors import Finding, SpecError
from orchestrator.folders import SweepFolder
from orchestrator.spec.notify import Notice, Notify
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from orchestrator.study.study import Study
from orchestrator.tracking.secrets import redact
from trainer.report import Point

_LAST_SECONDS = 15.0
_BY_HAND = frozenset({StopKind.INTERRUPTED, StopKind.STOPPED})


def webhook(spec: SweepSpec) -> str | None:
    """The webhook's address, from the environment; SpecError, without the address, where it is missing or none."""
    name = None if spec.notify is None else spec.notify.webhook_env
    if name is None:
        return None
    url = os.environ.get(name, "")
    if is_address(url):
        return url
    problem = f"the environment variable {name} " + ("holds no http(s) address" if url else "is not set")
    hint = "export it before the sweep, or set notify to null"
    raise SpecError([Finding(spec.name, "notify.webhook_env", problem, hint)])


class Notifier:
    """A View that passes everything on to another, and sends the notices that the sweep asks for."""

    def __init__(
        self,
        spec: SweepSpec,
        view: View,
        delivery: Delivery,
        config: Notify,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._view, self._delivery, self._config, self._clock = spec, view, delivery, config, clock
        self._running: set[int] = set()
        self._moved_at = clock()
        self._stalled = False

    # --- what the engine tells -----------------------------------------------------------------------------------

    def stage(self, text: str) -> None:
        """What the sweep is busy with; a sign of life."""
        self._moved()
        self._view.stage(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._view.say(text)

    def expect(self, steps: StepsOf) -> None:
        """The number of updates of a trial by its params."""
        self._view.expect(steps)

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial began or ended; one that diverged under this driver is told."""
        self._moved()
        if record.state is TrialState.RUNNING:
            self._running.add(record.number)
        elif record.diverged and record.number in self._running:
            self._tell("diverged", f"trial {record.number} of {self._spec.name} {record.reason}", record.number)
        self._view.trial_changed(record)

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics; the surest sign of life."""
        self._moved()
        self._view.points(number, points)

    def tick(self) -> None:
        """Time passed: has anything moved?"""
        minutes = (self._clock() - self._moved_at) / 60
        if not self._stalled and minutes >= self._config.stalled_minutes:
            self._stalled = True
            text = f"{self._spec.name} has stalled: no sign of any worker for {minutes:.0f} minutes"
            self._tell("stalled", text)
        self._complain()
        self._view.tick()

    def close(self) -> None:
        """Not ours to close: whoever opened the view closes it."""

    # --- the end -------------------------------------------------------------------------------------------------

    def ended(self, how: Stop | None, best: TrialRecord | None) -> None:
        """Tell how the sweep ended (None: by an error), unless a person stopped it; deliver what is left."""
        if how is None or how.kind not in _BY_HAND:
            word = "ended by an error" if how is None else how.kind.value
            words = [f"{self._spec.name}: {word}"]
            if how is not None and how.kind is not StopKind.FINISHED and how.text:
                words.append(how.text)
            words.append(
                "no trial completed"
                if best is None
                else f"best is trial {best.number} with {self._spec.goal.metric} = {best.value:.4g}"
            )
            self._tell("finished", "; ".join(words), None if best is None else best.number)
        self._delivery.close(_LAST_SECONDS)
        self._complain()

    # --- inside --------------------------------------------------------------------------------------------------

    def _moved(self) -> None:
        self._moved_at, self._stalled = self._clock(), False

    def _tell(self, event: Notice, text: str, trial: int | None = None) -> None:
        if event in self._config.on:
            self._delivery.send({"event": event, "sweep": self._spec.name, "trial": trial, "text": redact(text)})

    def _complain(self) -> None:
        for trouble in self._delivery.troubles():
            self._view.say(f"notify: {trouble}")


@contextmanager
def notifying(folder: SweepFolder, spec: SweepSpec, view: View) -> Generator[tuple[View, Callable[[Stop], None]]]:
    """A view that notifies as `notify:` says, and what to call when it is over; without that call, an error ended it.

    SpecError, before anything else, where the webhook's address is missing.
    """
    config = spec.notify
    if config is None:
        yield view, lambda _: None
        return
    notifier = Notifier(spec, view, Delivery(webhook(spec), config.command), config)
    how: list[Stop] = []
    try:
        yield notifier, how.append
    finally:
        notifier.ended(how[0] if how else None, _best(folder))


def _best(folder: SweepFolder) -> TrialRecord | None:
    if not Study.exists(folder):
        return None
    with Study.open(folder) as study:
        return study.best()
