"""A table that redraws itself in place, a few times a second at most."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from dashboards.frame import TrialView
from dashboards.standing import Clock, Standing
from dashboards.tables import trial_table
from orchestrator.engine.view import StepsOf
from orchestrator.spec.sweep import Goal, SweepSpec
from orchestrator.study.ranking import ranking
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from trainer.report import Point

REFRESH_SECONDS = 0.25
_ROWS_KEPT_FREE = 8
_TOLD = (TrialState.PAUSED, TrialState.PRUNED, TrialState.FAILED)


class LiveView:
    """The table of trials; verdicts are printed above it, so that none scrolls away unseen.

    What changes between two drawings is drawn with the next one: by what comes next, or by `tick`.
    """

    def __init__(
        self,
        spec: SweepSpec,
        console: Console,
        *,
        total: int | None = None,
        steps: StepsOf | None = None,
        before: float = 0.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._seen = Standing(spec, total, steps, clock, before=before)
        self._console, self._clock = console, clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_at: float | None = None
        self._stage = ""
        self._live.start()

    def stage(self, text: str) -> None:
        """What the sweep is busy with before its trials; drawn at once, as it may take a while."""
        self._stage = text
        self._draw()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text))

    def expect(self, steps: StepsOf) -> None:
        """The number of updates of a trial by its params, once known."""
        self._seen.steps = steps

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial began, ended or was issued again."""
        fell_now = self._seen.changed(record)  # what an earlier driver decided is in the table
        self._stage = ""
        if fell_now and record.state in _TOLD:
            word = "DIVERGED" if record.diverged else str(record.state)
            self.say(f"trial {record.number} {word}: {record.reason}")
        self.tick()

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics of a trial."""
        self._seen.trials[number].add(points)
        self.tick()

    def tick(self) -> None:
        """Time passed: draw, unless that was done just now."""
        if self._drawn_at is None or self._clock() - self._drawn_at >= REFRESH_SECONDS:
            self._draw()

    def close(self) -> None:
        """Leave the terminal as it was; the final table is printed by `summary`."""
        self._live.stop()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        # As lines: a verdict printed above has rich write the table again, and that must not lay it out again.
        lines = self._console.render_lines(self._render(), pad=False)
        self._live.update(SegmentLines(lines, new_lines=True), refresh=True)

    def _render(self) -> RenderableType:
        seen, size = self._seen, self._console.size
        head = Text(f"{seen.spec.name}  ", style="bold").append(seen.headline(), style="not bold")
        if self._stage:
            return Group(head, Text(self._stage, style="cyan"))
        room = max(3, size.height - _ROWS_KEPT_FREE)
        shown = most_telling(list(seen.trials.values()), room, seen.spec.goal)
        table = trial_table(
            shown,
            seen.spec.search.paths,
            seen.spec.goal,
            steps=seen.steps,
            width=size.width,
            most_reasons=room - len(shown),
        )
        hidden = len(seen.trials) - len(shown)
        return Group(head, table, Text(f"… and {hidden} finished trials more", style="dim") if hidden else Text(""))


def most_telling(views: list[TrialView], room: int, goal: Goal) -> list[TrialView]:
    """What fits: running trials, the best one, then the newest finished; shown in order of number."""
    if len(views) > room:
        best = [record.number for record in ranking([v.record for v in views], goal)[:1]]

        def urgency(view: TrialView) -> tuple[int, int]:
            finished = view.record.state.finished
            return (0 if view.record.number in best else 1 if not finished else 2, -view.record.number)

        views = sorted(views, key=urgency)[:room]
    return sorted(views, key=lambda v: v.record.number)
