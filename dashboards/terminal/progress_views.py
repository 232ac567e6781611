"""Progress of a running sweep: a live table on a terminal, plain lines where output is piped.

The table is redrawn in place at most four times a second; plain lines are one per event. The remaining time is
estimated from the measured speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from dashboards.analysis.seed_means import compared_paths, merge_curves
from dashboards.analysis.sweep_frame import TrialCurves, state_counts
from dashboards.formatting import format_about, format_duration, format_params, format_value, progress_bar
from dashboards.terminal.trial_tables import best_record, trial_table
from orchestrator.interfaces import UpdatesOf
from orchestrator.spec.objectives import Objective
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.metrics import COMPARISON_METRIC, MARGIN
from trainer.results import StepMetrics

Clock = Callable[[], float]
_COUNTED_STATES = ("running", "waiting", "paused", "pruned", "diverged", "failed")
_MIN_ESTIMATE_SECONDS = 10.0
_MIN_ESTIMATE_TRIALS, _MIN_ESTIMATE_SHARE = 0.25, 0.05
"""A remaining time is shown after so many seconds, and so many trials or such a share of what was left, whichever is
less."""
_SMOOTHING_SECONDS = 60.0
"""Time constant with which the remaining time follows the measured speed."""
_STALLED = 0.5
"""Without progress the remaining time counts down to this share of what the speed so far gives."""


class SweepProgress:
    """State of a sweep as shown by a view: trials with their curves, counts, remaining time."""

    def __init__(
        self,
        spec: SweepSpec,
        total: int | None = None,
        updates_of: UpdatesOf | None = None,
        clock: Clock = time.monotonic,
        *,
        before: float = 0.0,
        running_before: Collection[int] = (),
    ) -> None:
        """`before`: seconds that earlier drivers of the sweep ran; `running_before`: trials on which workers work."""
        self._before, self._running_before = before, running_before
        self.spec, self.total, self.updates_of = spec, total, updates_of
        self.trials: dict[int, TrialCurves] = {}
        self.clock, self._began = clock, clock()
        self._first_at: float | None = None
        self._done_before = 0.0
        self._opened_at = time.time()
        self._left: tuple[float, float, float] | None = None

    def update(self, record: TrialRecord) -> bool:
        """Store the record; return whether the trial was known as unfinished."""
        curves = self.trials.get(record.number)
        was_unfinished = curves is not None and not curves.record.state.is_final
        if curves is None:
            curves = self.trials[record.number] = TrialCurves(record)
            self._done_before += self._share_of(curves)  # an earlier driver's work is not part of this speed
            self._first_at = self.clock() if self._first_at is None else self._first_at
            if (
                record.state is TrialState.RUNNING
                and record.number not in self._running_before
                and (record.started_at is not None and record.started_at < self._opened_at)
            ):
                curves.idle_word = "WAITING"  # an earlier driver's, until a worker takes it up
        else:
            if record.attempts > curves.record.attempts or record.state is not TrialState.RUNNING:
                curves.idle_word = ""
            elif curves.record.state is TrialState.PAUSED:
                curves.idle_word = "WAITING"
            curves.record = record
        return was_unfinished

    def headline(self) -> str:
        """Return progress bar, counts by state, elapsed time and estimated remaining time."""
        waiting = sum(bool(curves.idle_word) for curves in self.trials.values())
        ends = state_counts(curves.record for curves in self.trials.values() if not curves.idle_word) | (
            {"waiting": waiting} if waiting else {}
        )
        done = sum(curves.record.state.is_final for curves in self.trials.values())
        extra = sum(curves.record.by_command for curves in self.trials.values())
        total = max((self.total or 0) + extra, len(self.trials))
        share = self._done() / max(1, total)
        count = f"{progress_bar(share, 20)} {done}/{total} trials" + (f" ({extra} enqueued)" if extra else "")
        text = [count] if total else []
        text += [f"{ends[word]} {word}" for word in _COUNTED_STATES if word in ends]
        elapsed = self._before + self.clock() - self._began
        text.append(f"{format_duration(elapsed)} so far")
        left = self._seconds_left(total)
        if left is not None and done < total:
            text.append(f"about {format_about(left)} left")
        return " · ".join(text)

    def total_updates(self, curves: TrialCurves) -> int | None:
        """Return the total updates of the trial; None before the data is known."""
        return None if self.updates_of is None else self.updates_of(curves.record.params)

    def _done(self) -> float:
        """Return the finished trials plus the finished fractions of running ones."""
        return sum(self._share_of(curves) for curves in self.trials.values())

    def _share_of(self, curves: TrialCurves) -> float:
        if curves.record.state.is_final:
            return 1.0
        planned_updates = self.total_updates(curves)
        return min(1.0, curves.last_update / planned_updates) if planned_updates else 0.0

    def _seconds_left(self, total: int) -> float | None:
        done = self._done()
        progress, elapsed = (
            done - self._done_before,
            self.clock() - (self._began if self._first_at is None else self._first_at),
        )
        least = min(_MIN_ESTIMATE_TRIALS, _MIN_ESTIMATE_SHARE * (total - self._done_before))
        if progress <= 0 or progress < least or elapsed < _MIN_ESTIMATE_SECONDS:
            return None
        now, measured = self.clock(), (total - done) * elapsed / progress
        left = measured
        if self._left is not None:
            at, before, done_then = self._left
            left = before - (now - at)
            if done == done_then:
                left = max(left, _STALLED * measured)
            else:
                left += (1 - math.exp(-(now - at) / _SMOOTHING_SECONDS)) * (measured - left)
        self._left = (now, max(0.0, left), done)
        return self._left[1]


REFRESH_SECONDS = 0.25
_ROWS_KEPT_FREE = 8
"""Terminal rows not used by the table."""
_LOGGED_STATES = (TrialState.PAUSED, TrialState.PRUNED, TrialState.FAILED)


class LiveTableView:
    """Table of trials, redrawn in place; log lines and stop reasons are printed above it.

    Changes within REFRESH_SECONDS of the last drawing are drawn with the next change or `refresh`.
    """

    def __init__(self, progress: SweepProgress, console: Console) -> None:
        self._progress, self._console, self._clock = progress, console, progress.clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_at: float | None = None
        self._stage = ""
        self._stage_progress: tuple[int, int] | None = None
        self._live.start()

    def set_activity(self, text: str) -> None:
        """Show the current stage before the trials; drawn at once."""
        self._stage = text
        self._stage_progress = None
        self._draw()

    def set_stage_progress(self, done: int, total: int) -> None:
        """Draw a bar beside the current stage."""
        self._stage_progress = (done, total)
        self.refresh()

    def log(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(Text(text))

    def set_total_updates(self, updates_of: UpdatesOf) -> None:
        """Set the function that returns a trial's total updates from its params."""
        self._progress.updates_of = updates_of

    def change_spec(self, spec: SweepSpec, total: int | None) -> None:
        """Use a changed budget; `total`: trials of the sweep, None if unknown."""
        self._progress.spec, self._progress.total = spec, total

    def update_trial(self, record: TrialRecord) -> None:
        """Show a trial that started, ended or was retried."""
        was_unfinished = self._progress.update(record)  # ends under earlier drivers are not logged again
        self._stage = ""
        if was_unfinished and record.state in _LOGGED_STATES:
            word = "DIVERGED" if record.diverged else str(record.state)
            self.log(f"trial {record.number} {word}: {record.reason.removeprefix('diverged: ')}")
        self.refresh()

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        """Add new metrics of a trial."""
        self._progress.trials[number].add(metrics)
        self.refresh()

    def refresh(self) -> None:
        """Draw, unless the last drawing is less than REFRESH_SECONDS ago."""
        if self._drawn_at is None or self._clock() - self._drawn_at >= REFRESH_SECONDS:
            self._draw()

    def close(self) -> None:
        """Remove the table; the final one is printed by `print_final_summary`."""
        self._live.stop()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        # Rendered to lines, since rich draws the table again for every line printed above it.
        lines = self._console.render_lines(self._render(), pad=False)
        self._live.update(SegmentLines(lines, new_lines=True), refresh=True)

    def _render(self) -> RenderableType:
        progress, size = self._progress, self._console.size
        head = Text(f"{progress.spec.name}  ", style="bold").append(progress.headline(), style="not bold")
        if self._stage:
            bar = ""
            if self._stage_progress is not None:
                done, total = self._stage_progress
                bar = f"{progress_bar(done / max(1, total), 20)} {done}/{total}  "
            return Group(head, Text(f"{bar}{self._stage}", style="cyan"))
        max_rows = max(3, size.height - _ROWS_KEPT_FREE)
        rows = merge_curves(list(progress.trials.values()), progress.spec)
        seeds = progress.spec.seeds_per_configuration
        shown = most_relevant(rows, max_rows, progress.spec.first_objective, seeds)
        table = trial_table(
            shown,
            compared_paths(progress.spec),
            progress.spec.first_objective,
            updates_of=progress.updates_of,
            width=size.width,
            most_reasons=max_rows - len(shown),
            further=progress.spec.also,
            seeds=seeds,
        )
        hidden = len(rows) - len(shown)
        return Group(head, table, Text(f"… and {hidden} finished trials more", style="dim") if hidden else Text(""))


def most_relevant(
    all_curves: list[TrialCurves], max_rows: int, objective: Objective, seeds: int = 1
) -> list[TrialCurves]:
    """Return at most `max_rows` trials by number: the best, the running ones, then the newest finished ones."""
    if len(all_curves) > max_rows:
        first = best_record([curves.record for curves in all_curves], objective, seeds)
        best = None if first is None else first.number

        def urgency(curves: TrialCurves) -> tuple[int, int]:
            finished = curves.record.state.is_final
            return (0 if curves.record.number == best else 1 if not finished else 2, -curves.record.number)

        all_curves = sorted(all_curves, key=urgency)[:max_rows]
    return sorted(all_curves, key=lambda curves: curves.record.number)


class PlainLogView:
    """Prints one line per event, for log files and pipes."""

    def __init__(self, progress: SweepProgress, console: Console) -> None:
        self._progress, self._console = progress, console

    def set_activity(self, text: str) -> None:
        """Print the current stage before the trials."""
        self.log(text)

    def set_stage_progress(self, done: int, total: int) -> None:
        """Do nothing: a line per update would fill the log."""

    def log(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text), soft_wrap=True)

    def set_total_updates(self, updates_of: UpdatesOf) -> None:
        """Set the function that returns a trial's total updates from its params."""
        self._progress.updates_of = updates_of

    def change_spec(self, spec: SweepSpec, total: int | None) -> None:
        """Use a changed budget; `total`: trials of the sweep, None if unknown."""
        self._progress.spec, self._progress.total = spec, total

    def update_trial(self, record: TrialRecord) -> None:
        """Print a trial that started, ended or was retried."""
        self._progress.update(record)
        word = self._progress.trials[record.number].idle_word or record.state
        text = [f"trial {record.number} {word}", format_params(record.params, self._progress.spec.search.paths)]
        if record.value is not None:
            values = zip(self._progress.spec.objectives, record.values or (record.value,), strict=False)
            text += [f"{objective.metric}={format_value(value)}" for objective, value in values]
        if record.reason:
            text.append(record.reason)
        if record.state is TrialState.RUNNING and record.attempts > 1:
            text.append(f"attempt {record.attempts}")
        self.log("  ".join(w for w in text if w))
        if record.state.is_final:
            self.log(self._progress.headline())

    def add_metrics(self, number: int, metrics: Sequence[StepMetrics]) -> None:
        """Print one line per evaluation of a trial."""
        curves = self._progress.trials[number]
        curves.add(metrics)
        for step_metrics in metrics:
            objectives = (objective.metric for objective in self._progress.spec.objectives)
            names = dict.fromkeys((*objectives, COMPARISON_METRIC, MARGIN))
            texts = [f"{n}={format_value(step_metrics.metrics[n])}" for n in names if n in step_metrics.metrics]
            if texts:
                planned_updates = self._progress.total_updates(curves)
                of = f"/{planned_updates}" if planned_updates else ""
                self.log(f"trial {number} step {step_metrics.step}{of}  " + "  ".join(texts))

    def refresh(self) -> None:
        """Do nothing: lines are not redrawn."""

    def close(self) -> None:
        """Do nothing: the terminal was not changed."""


def open_view(
    spec: SweepSpec,
    console: Console,
    *,
    total: int | None = None,
    updates_of: UpdatesOf | None = None,
    before: float = 0.0,
    running_before: Collection[int] = (),
) -> LiveTableView | PlainLogView:
    """Return a live table on a terminal, else plain lines; the arguments are those of `SweepProgress`."""
    kind = LiveTableView if console.is_terminal and not console.is_dumb_terminal else PlainLogView
    return kind(SweepProgress(spec, total, updates_of, before=before, running_before=running_before), console)
