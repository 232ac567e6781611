"""How far a sweep is, as its views know it: done, left, and the time left from the measured speed."""

from __future__ import annotations

import time
from collections.abc import Callable

from dashboards.frame import TrialView, endings
from dashboards.sparks import bar, duration
from orchestrator.engine.view import StepsOf
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.records import TrialRecord

Clock = Callable[[], float]
_COUNTED = ("running", "paused", "pruned", "diverged", "failed")
_EARLIEST = 3.0
"""Seconds before a speed is worth telling."""


class Standing:
    """What a view knows of the sweep so far."""

    def __init__(
        self,
        spec: SweepSpec,
        total: int | None,
        steps: StepsOf | None,
        clock: Clock = time.monotonic,
        *,
        before: float = 0.0,
    ) -> None:
        """before: seconds that the sweep had run already."""
        self._before = before
        self.spec, self.total, self.steps = spec, total, steps
        self.trials: dict[int, TrialView] = {}
        self._clock, self._began = clock, clock()
        self._first_at: float | None = None
        self._done_before = 0.0

    def changed(self, record: TrialRecord) -> bool:
        """Take the record; whether the trial was known to be under way."""
        view = self.trials.get(record.number)
        under_way = view is not None and not view.record.state.finished
        if view is None:
            view = self.trials[record.number] = TrialView(record)
            self._done_before += self._share_of(view)  # an earlier driver's work says nothing of this one's speed
            self._first_at = self._clock() if self._first_at is None else self._first_at
        else:
            view.record = record
        return under_way

    def headline(self) -> str:
        """Done, left, and the time left from the measured speed."""
        ends = endings(v.record for v in self.trials.values())
        done = sum(v.record.state.finished for v in self.trials.values())
        total = max(self.total or 0, len(self.trials))  # those by hand come on top
        share = self._done() / max(1, total)
        words = [f"{bar(share, 20)} {done}/{total} trials"]
        words += [f"{ends[word]} {word}" for word in _COUNTED if word in ends]
        elapsed = self._before + self._clock() - self._began
        words.append(f"{duration(elapsed)} so far")
        left = self._seconds_left(total)
        if left is not None and done < total:
            words.append(f"about {duration(left)} left")
        return " · ".join(words)

    def steps_of(self, view: TrialView) -> int | None:
        """Updates of the whole trial, once known."""
        return None if self.steps is None else self.steps(view.record.params)

    def _done(self) -> float:
        """In trials: a running one counts with the share of its updates."""
        return sum(self._share_of(view) for view in self.trials.values())

    def _share_of(self, view: TrialView) -> float:
        if view.record.state.finished:
            return 1.0
        steps = self.steps_of(view)
        return min(1.0, view.step / steps) if steps else 0.0

    def _seconds_left(self, total: int) -> float | None:
        done = self._done()
        fresh, elapsed = (
            done - self._done_before,
            self._clock() - (self._began if self._first_at is None else self._first_at),
        )
        if fresh <= 0 or elapsed < _EARLIEST:
            return None
        return (total - done) / (fresh / elapsed)
