"""One line per event, for logs and pipes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from dashboards.frame import show, show_params
from dashboards.standing import Standing
from dashboards.tables import ACCURACIES, MARGINS
from orchestrator.engine.view import StepsOf
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from trainer.report import Point


class PlainView:
    """One line per event, for logs and pipes."""

    def __init__(
        self,
        spec: SweepSpec,
        console: Console,
        *,
        total: int | None = None,
        steps: StepsOf | None = None,
        before: float = 0.0,
    ) -> None:
        self._seen = Standing(spec, total, steps, before=before)
        self._console = console

    def stage(self, text: str) -> None:
        """What the sweep is busy with before its trials."""
        self.say(text)

    def say(self, text: str) -> None:
        """A line."""
        self._console.print(Text(text), soft_wrap=True)

    def expect(self, steps: StepsOf) -> None:
        """The number of updates of a trial by its params, once known."""
        self._seen.steps = steps

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial began, ended or was issued again."""
        self._seen.changed(record)
        words = [f"trial {record.number} {record.state}", show_params(record.params, self._seen.spec.search.paths)]
        if record.value is not None:
            words.append(f"{self._seen.spec.goal.metric}={show(record.value)}")
        if record.reason:
            words.append(record.reason)
        if record.state is TrialState.RUNNING and record.attempts > 1:
            words.append(f"attempt {record.attempts}")
        self.say("  ".join(w for w in words if w))
        if record.state.finished:
            self.say(self._seen.headline())

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics of a trial: a line per evaluation."""
        view = self._seen.trials[number]
        view.add(points)
        for point in points:
            names = dict.fromkeys((self._seen.spec.goal.metric, ACCURACIES, MARGINS))
            told = [f"{n}={show(point.metrics[n])}" for n in names if n in point.metrics]
            if told:
                steps = self._seen.steps_of(view)
                of = f"/{steps}" if steps else ""
                self.say(f"trial {number} step {point.step}{of}  " + "  ".join(told))

    def tick(self) -> None:
        """Nothing to redraw."""

    def close(self) -> None:
        """Nothing to tidy."""
