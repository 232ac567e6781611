"""A sweep on the terminal: a live table where there is one, plain lines where output is piped."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from dashboards.frame import TrialView, counts, show, show_params
from dashboards.sparks import bar, duration
from dashboards.tables import ACCURACIES, MARGINS, trial_table
from orchestrator.engine.view import StepsOf
from orchestrator.spec.sweep import Goal, SweepSpec
from orchestrator.study.ranking import front, ranking
from orchestrator.study.records import TrialRecord
from orchestrator.study.state import TrialState
from trainer.report import Point

_REFRESH_SECONDS = 0.5
_ROWS_KEPT_FREE = 8
_PIPED = 160


class _Seen:
    """What a view knows of the sweep so far."""

    def __init__(self, spec: SweepSpec, total: int | None, steps: StepsOf | None) -> None:
        self.spec, self.total, self.steps = spec, total, steps
        self.trials: dict[int, TrialView] = {}
        self.began = time.monotonic()
        self._done_before: float | None = None

    def changed(self, record: TrialRecord) -> bool:
        """Take the record; whether the trial was known to be under way."""
        view = self.trials.get(record.number)
        under_way = view is not None and not view.record.state.finished
        if view is None:
            self.trials[record.number] = TrialView(record)
        else:
            view.record = record
        return under_way

    def headline(self) -> str:
        """Done, left, and the time left from the measured speed."""
        state = counts(v.record for v in self.trials.values())
        done = sum(n for s, n in state.items() if s.finished)
        total = max(self.total or 0, len(self.trials))  # those by hand come on top
        share = self._done() / max(1, total)
        words = [f"{bar(share, 20)} {done}/{total} trials"]
        words += [
            f"{state[s]} {s.lower()}"
            for s in (TrialState.RUNNING, TrialState.PAUSED, TrialState.PRUNED, TrialState.FAILED)
            if state[s]
        ]
        words.append(f"{duration(time.monotonic() - self.began)} so far")
        left = self._seconds_left(total)
        if left is not None and done < total:
            words.append(f"about {duration(left)} left")
        return " · ".join(words)

    def steps_of(self, view: TrialView) -> int | None:
        return None if self.steps is None else self.steps(view.record.params)

    def _done(self) -> float:
        """In trials: a running one counts with the share of its updates."""
        return sum(self._share_of(view) for view in self.trials.values())

    def _share_of(self, view: TrialView) -> float:
        steps = self.steps_of(view)
        return 1.0 if view.record.state.finished else min(1.0, view.step / steps) if steps else 0.0

    def _seconds_left(self, total: int) -> float | None:
        done = self._done()
        if self._done_before is None:
            self._done_before = done  # what an earlier driver did says nothing of this one's speed
        fresh = done - self._done_before
        elapsed = time.monotonic() - self.began
        if fresh <= 0 or elapsed < 3:
            return None
        return (total - done) / (fresh / elapsed)


class LiveView:
    """A table that redraws itself in place; verdicts are printed above it, so that none scrolls away unseen."""

    def __init__(
        self, spec: SweepSpec, console: Console, *, total: int | None = None, steps: StepsOf | None = None
    ) -> None:
        self._seen = _Seen(spec, total, steps)
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_at = 0.0
        self._stage = ""
        self._live.start()

    def stage(self, text: str) -> None:
        """What the sweep is busy with before its trials."""
        self._stage = text
        self._draw(force=True)

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
        if fell_now and record.state in (TrialState.PAUSED, TrialState.PRUNED, TrialState.FAILED):
            word = "DIVERGED" if record.diverged else str(record.state)
            self.say(f"trial {record.number} {word}: {record.reason}")
        self._draw(force=True)

    def points(self, number: int, points: Sequence[Point]) -> None:
        """New metrics of a trial."""
        self._seen.trials[number].add(points)
        self._draw()

    def tick(self) -> None:
        """Time passed."""
        self._draw()

    def close(self) -> None:
        """Leave the terminal as it was; the final table is printed by `summary`."""
        self._live.stop()

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._drawn_at >= _REFRESH_SECONDS:
            self._drawn_at = now
            self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        seen, size = self._seen, self._console.size
        head = Text(f"{seen.spec.name}  ", style="bold").append(seen.headline(), style="not bold")
        if self._stage:
            return Group(head, Text(self._stage, style="cyan"))
        room = max(3, size.height - _ROWS_KEPT_FREE)
        shown = _most_telling(list(seen.trials.values()), room, seen.spec.goal)
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


def _most_telling(views: list[TrialView], room: int, goal: Goal) -> list[TrialView]:
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
        self, spec: SweepSpec, console: Console, *, total: int | None = None, steps: StepsOf | None = None
    ) -> None:
        self._seen = _Seen(spec, total, steps)
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


def summary(spec: SweepSpec, views: Sequence[TrialView], console: Console, *, steps: StepsOf | None) -> None:
    """The table of trials, the best configuration, and what to type next."""
    ordered = sorted(views, key=lambda v: v.record.number)
    console.print(trial_table(ordered, spec.search.paths, spec.goal, steps=steps, width=console.size.width))
    ranked = ranking([v.record for v in ordered], *spec.goals)
    if not ranked:
        over = bool(ordered) and all(v.record.state.finished for v in ordered)
        console.print(
            Text("No trial completed; the reasons are in the table.", style="red")
            if over
            else Text("No trial has completed yet.", style="yellow")
        )
        return
    if len(spec.goals) > 1:
        _print_front(spec, front(ranked, spec.goals), console)
        return
    best = ranked[0]
    console.print(
        Text("Best: ", style="bold").append(f"trial {best.number}", style="bold green")
        + Text(f"  {show_params(best.params, spec.search.paths)}  {spec.goal.metric}={show(best.value)}")
    )
    start = next((v.values(spec.goal.metric)[0] for v in ordered if v.values(spec.goal.metric)), None)
    if start is not None and best.value is not None:
        console.print(Text(f"The start model had {spec.goal.metric}={show(start)}.", style="dim"))


def _print_front(spec: SweepSpec, best: Sequence[TrialRecord], console: Console) -> None:
    """Of several goals no trial is the best: those that no other one beats in all of them."""
    console.print(Text(f"The Pareto front of {len(spec.goals)} goals:", style="bold"))
    for record in best:
        told = zip(spec.goals, record.values or (), strict=True)
        values = "  ".join(f"{goal.metric}={show(value)}" for goal, value in told)
        console.print(
            Text(f"  trial {record.number}", style="bold green")
            + Text(f"  {show_params(record.params, spec.search.paths)}  {values}")
        )


def wide_console() -> Console:
    """Standard output; piped, no line is broken to fit a terminal that is not there."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPED)


def open_view(
    spec: SweepSpec, console: Console, *, total: int | None = None, steps: StepsOf | None = None
) -> LiveView | PlainView:
    """The view that fits where the output goes."""
    kind = LiveView if console.is_terminal else PlainView
    return kind(spec, console, total=total, steps=steps)
