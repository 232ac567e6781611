"""What stops a running trial, in the order of its points: the guard, then the pruner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from orchestrator.study.guard import Guard
from orchestrator.study.pruning.decide import Judge
from trainer.metrics import EVAL
from trainer.report import GO_ON, Point, Verdict

OF_THE_LOSS = ("loss", "grad_norm", f"{EVAL}loss")
"""Metrics that change with what scales the loss."""


class Watch:
    """Watches one trial. A function of its points by step: told again, or in other batches, the verdict is the same.

    `judge` gives the pruner with what the trial may know now; in a reproducible sweep that never changes.
    """

    def __init__(self, guard: Guard, judge: Callable[[], Judge], metric: str, *, inherited: int = -1) -> None:
        """`inherited`: the update up to which the points are another trial's, whom guard and pruner let pass."""
        self._guard, self._judge, self._metric, self._inherited = guard, judge, metric, inherited
        self._course: dict[int, float] = {}
        self._seen = -1
        self.verdict = GO_ON

    def see(self, points: Iterable[Point]) -> list[Point]:
        """Take points, in any order within the call, and return those that count: none beyond the trial's end."""
        counted: list[Point] = []
        for point in sorted(points, key=lambda p: p.step):
            fresh = point.step > self._seen
            if fresh and self.verdict.stop:
                break
            if point.step <= self._inherited:
                counted.append(self._inherit(point))
                continue
            clean = self._guard.see([point])
            counted += clean
            if fresh:
                self._seen = point.step
                self.verdict = self._guard.verdict
                if not self.verdict.stop and clean and self._metric in clean[0].metrics:
                    self._course[point.step] = clean[0].metrics[self._metric]
                    if reason := self._judge().reason(self._course, point.step, point.pairs):
                        self.verdict = Verdict(stop=True, reason=reason)
        return counted

    def _inherit(self, point: Point) -> Point:
        """The start model and the way so far are the other trial's; the scale of the loss may be this one's own."""
        self._guard.see([replace(point, metrics={n: v for n, v in point.metrics.items() if n not in OF_THE_LOSS})])
        self._seen = max(self._seen, point.step)
        if self._metric in point.metrics:
            self._course[point.step] = point.metrics[self._metric]
        return point
