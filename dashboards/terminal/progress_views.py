"""A table that redraws itself in place, a few times a second at most.

One line per event, for logs and pipes.

How far a sweep is, as its views know it: done, left, and the time left from the measured speed.

A sweep on the terminal: a live table where there is one, plain lines where output is piped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from dashboards.analysis.sweep_frame import TrialView, endings, show, show_params
from dashboards.formatting import bar, duration
from dashboards.terminal.trial_tables import ACCURACIES, MARGINS, trial_table
from orchestrator.interfaces import StepsOf
from orchestrator.spec.sweep_spec import Goal, SweepSpec
from orchestrator.study.trial_records import TrialRecord, TrialState, ranking
from trainer.results import Point

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


_PIPED = 160


def wide_console() -> Console:
    """Standard output; piped, no line is broken to fit a terminal that is not there."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPED)


def open_view(
    spec: SweepSpec, console: Console, *, total: int | None = None, steps: StepsOf | None = None, before: float = 0.0
) -> LiveView | PlainView:
    """The view that fits where the output goes. `before`: seconds that the sweep had run when it is opened."""
    kind = LiveView if console.is_terminal and not console.is_dumb_terminal else PlainView
    return kind(spec, console, total=total, steps=steps, before=before)
